package doctor

import "context"

func (d *Doctor) checkDovecot(context.Context) {}
