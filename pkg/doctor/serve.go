package doctor

import "context"

func (d *Doctor) checkServe(context.Context) {}
