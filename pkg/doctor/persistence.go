package doctor

import "context"

func (d *Doctor) checkPersistence(context.Context) {}
