package doctor

import "context"

func (d *Doctor) checkRules(context.Context) {}
