package main

import (
	"net"
	"net/http"
	"sync"
)

// connections are the accepted ones of an http.Server, at most as many as there are
// places. They end without the loss of a request. http.Server.Shutdown would lose one
// that arrives just as it closes the connection: Dovecot does not repeat it.
type connections struct {
	places chan struct{}
	ending chan struct{} // closed at the end
	open   sync.WaitGroup

	mu   sync.Mutex
	idle map[net.Conn]bool
}

// newConnections returns those of a server, which serves listeners of type listener.
func newConnections(web *http.Server, most int) *connections {
	c := &connections{places: make(chan struct{}, most), ending: make(chan struct{}), idle: make(map[net.Conn]bool)}
	handler := web.Handler
	web.ConnState = c.changed
	web.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c.isEnding() {
			w.Header().Set("Connection", "close")
		}
		handler.ServeHTTP(w, r)
	})
	return c
}

// listener accepts a connection when there is a place for it.
type listener struct {
	net.Listener
	*connections
}

func (l listener) Accept() (net.Conn, error) {
	select {
	case l.places <- struct{}{}:
	case <-l.ending:
		return nil, net.ErrClosed
	}
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
		if c.isEnding() {
			halfClose(conn)
		}
	case http.StateClosed, http.StateHijacked:
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
	close(c.ending)
	for conn := range c.idle {
		halfClose(conn)
	}
}

func (c *connections) isEnding() bool {
	select {
	case <-c.ending:
		return true
	default:
		return false
	}
}

func halfClose(conn net.Conn) {
	if conn, ok := conn.(interface{ CloseWrite() error }); ok {
		_ = conn.CloseWrite() // fails if the client has closed it
	}
}
