package main

import (
	"net"
	"net/http"
	"sync"
)

// connections are those of an http.Server, at most as many as there are places. It
// ends them without losing a request, which http.Server.Shutdown does not: a
// request that arrives just then meets a closed connection, and Dovecot repeats
// none.
type connections struct {
	places chan struct{}
	open   sync.WaitGroup

	mu     sync.Mutex
	idle   map[net.Conn]bool
	ending bool
}

func newConnections(most int) *connections {
	return &connections{places: make(chan struct{}, most), idle: make(map[net.Conn]bool)}
}

// listener accepts a connection when there is a place for it. The server that
// serves it must have changed as its ConnState.
type listener struct {
	net.Listener
	places chan struct{}
}

func (l listener) Accept() (net.Conn, error) {
	l.places <- struct{}{}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.places
	}
	return conn, err
}

func (c *connections) changed(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.idle, conn)
	switch state {
	case http.StateNew:
		c.open.Add(1)
	case http.StateIdle:
		c.idle[conn] = true
		if c.ending {
			halfClose(conn)
		}
	case http.StateClosed:
		<-c.places
		c.open.Done()
	}
}

// end tells the clients that no more answers follow, each when it has the one that
// it waits for. A client then closes its connection. What it has sent before is
// still read.
func (c *connections) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ending = true
	for conn := range c.idle {
		halfClose(conn)
	}
}

func halfClose(conn net.Conn) {
	if conn, ok := conn.(interface{ CloseWrite() error }); ok {
		_ = conn.CloseWrite() // fails if the client has closed it
	}
}
