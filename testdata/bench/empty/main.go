// Command empty becomes its arguments, and does nothing else: the least that a
// login can cost with a post-login program in Go.
package main

import (
	"os"
	"os/exec"
	"syscall"
)

func main() {
	path, err := exec.LookPath(os.Args[1])
	if err == nil {
		err = syscall.Exec(path, os.Args[1:], os.Environ())
	}
	println(err.Error())
	os.Exit(127)
}
