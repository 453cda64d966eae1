package doctor

import "context"

func (d *Doctor) checkFail2ban(context.Context) {}
