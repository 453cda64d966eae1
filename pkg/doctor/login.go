package doctor

import "context"

func (d *Doctor) checkLogin(context.Context) {}
