package cluster

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/valkey-io/valkey-go"
	"golang.org/x/sys/unix"

	"nftwl/pkg/config"
)

const (
	// engineTimeout is how long the engine has to answer.
	engineTimeout = 3 * time.Second
	// block is how long the engine may wait for news before it answers.
	block = time.Second
	// logLength is how many entries of a list's log the engine keeps, about. A
	// machine that has missed more reads the whole list.
	logLength = "10000"
	// atOnce is how many records go into one entry.
	atOnce = 128
	// page is how many fields of a list are read at once.
	page = 1000
)

// engine is a Redis or Valkey. Its methods are safe for concurrent use.
//
// A list's keys, which hold "{NAME}" so that all are on one machine of a cluster
// of engines:
//
//	nftwl:{NAME}:trusted       hash    a field: a record
//	nftwl:{NAME}:trusted:log   stream  what was accepted, with its sequence
//	nftwl:{NAME}:trusted:meta  hash    epoch, sequence, cleared
type engine struct {
	client valkey.Client
	name   string
	node   string
}

// dial connects to the engine of a configuration.
func dial(c *config.Cluster, node, password string) (*engine, error) {
	o, err := valkey.ParseURL(c.Server)
	if err != nil {
		return nil, err
	}
	o.Password = password
	o.ClientName = "nftwld"
	o.ClientSetInfo = valkey.DisableClientSetInfo // an ACL can forbid it
	o.ForceSingleClient = o.Sentinel.MasterSet == ""
	o.Sentinel.TopologyRefreshInterval = 5 * time.Second
	o.DisableCache, o.DisableRetry = true, true
	o.PipelineMultiplex = -1 // one connection, and one that blocks
	o.BlockingPoolSize = 2
	o.RingScaleEachConn = 8
	o.ReadBufferEachConn, o.WriteBufferEachConn = 64<<10, 64<<10
	o.Dialer.Timeout = engineTimeout
	o.ConnWriteTimeout = engineTimeout + block
	if o.TLSConfig != nil && c.CAFile != "" {
		pem, err := os.ReadFile(c.CAFile)
		if err != nil {
			return nil, err
		}
		o.TLSConfig.RootCAs = x509.NewCertPool()
		if !o.TLSConfig.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no certificate", c.CAFile)
		}
	}
	if o.TLSConfig != nil {
		o.TLSConfig.ServerName = "" // that of each address, as Sentinel names others
	}
	o.Sentinel.TLSConfig = o.TLSConfig
	o.Sentinel.Dialer.Timeout = o.Dialer.Timeout
	client, err := valkey.NewClient(o)
	if err != nil {
		if o.DialCtxFn == nil && sandboxed() {
			err = ErrSandbox
		}
		return nil, err
	}
	return &engine{client, c.Name, node}, nil
}

// Clear empties a list on all machines that share it: trusted or banned. What is
// added from then on stays.
func Clear(c *config.Cluster, password, name string) error {
	e, err := dial(c, NodeName(c), password)
	if err == nil {
		defer e.close()
		err = e.clear(context.Background(), list(name))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", c.Server, err)
	}
	return nil
}

func (e *engine) close() { e.client.Close() }

func (e *engine) key(l list, suffix string) string {
	return "nftwl:{" + e.name + "}:" + string(l) + suffix
}

// do sends a command, and waits at most engineTimeout and what is added to it.
func (e *engine) do(ctx context.Context, more time.Duration, words ...string) valkey.ValkeyResult {
	ctx, cancel := context.WithTimeout(ctx, engineTimeout+more)
	defer cancel()
	command := e.client.B().Arbitrary(words...)
	if more > 0 {
		return e.client.Do(ctx, command.Blocking())
	}
	return e.client.Do(ctx, command.Build())
}

// now returns the engine's time in milliseconds since 1970.
func (e *engine) now(ctx context.Context) (int64, error) {
	parts, err := e.do(ctx, 0, "TIME").AsIntSlice()
	if err != nil {
		return 0, err
	}
	if len(parts) != 2 {
		return 0, errors.New("TIME: not an answer of Redis")
	}
	return parts[0]*1000 + parts[1]/1000, nil
}

// position is how far a machine has read a list.
type position struct {
	id       string // of the last entry in the log
	epoch    string // changes if the engine has lost everything
	sequence int64  // of the entry; each has one more than that before
}

// meta returns what the engine says of a list; cleared is when it was emptied on
// all machines, in its own time; 0 for never.
func (e *engine) meta(ctx context.Context, l list) (p position, cleared int64, err error) {
	values, err := e.do(ctx, 0, "HMGET", e.key(l, ":meta"), "epoch", "sequence", "cleared").AsStrSlice()
	if err != nil || len(values) != 3 {
		return p, 0, orOdd(err)
	}
	p.epoch = values[0]
	p.sequence, _ = strconv.ParseInt(values[1], 10, 64) // none yet
	cleared, _ = strconv.ParseInt(values[2], 10, 64)
	return p, cleared, nil
}

func orOdd(err error) error {
	if err == nil {
		return errors.New("not an answer of Redis")
	}
	return err
}

// end returns the position at the end of a list's log.
func (e *engine) end(ctx context.Context, l list) (p position, cleared int64, err error) {
	if p, cleared, err = e.meta(ctx, l); err != nil {
		return p, 0, err
	}
	last, err := e.do(ctx, 0, "XREVRANGE", e.key(l, ":log"), "+", "-", "COUNT", "1").AsXRange()
	if err != nil {
		return p, 0, err
	}
	p.id = "0-0"
	if len(last) > 0 {
		p.id = last[0].ID
		p.sequence, _ = strconv.ParseInt(last[0].FieldValues["sequence"], 10, 64)
	}
	return p, cleared, nil
}

// entry is a part of a list's log.
type entry struct {
	list list
	position
	node    string
	cleared int64             // when the list was emptied on all machines, if that is what it says; else 0
	records map[string]string // by field
}

// read waits for entries after the given positions. Without any, it returns none.
func (e *engine) read(ctx context.Context, after map[list]position) ([]entry, error) {
	words := []string{"XREAD", "COUNT", "100", "BLOCK", strconv.FormatInt(block.Milliseconds(), 10), "STREAMS"}
	var lists []list
	for l := range after {
		lists = append(lists, l)
		words = append(words, e.key(l, ":log"))
	}
	for _, l := range lists {
		words = append(words, after[l].id)
	}
	streams, err := e.do(ctx, block, words...).AsXRead()
	if err != nil && !valkey.IsValkeyNil(err) {
		return nil, err
	}
	var entries []entry
	for _, l := range lists {
		for _, x := range streams[e.key(l, ":log")] {
			n := entry{list: l, position: position{id: x.ID, epoch: x.FieldValues["epoch"]}, node: x.FieldValues["node"]}
			n.sequence, _ = strconv.ParseInt(x.FieldValues["sequence"], 10, 64)
			n.cleared, _ = strconv.ParseInt(x.FieldValues["cleared"], 10, 64)
			n.records = x.FieldValues
			for _, key := range []string{"epoch", "sequence", "node", "cleared"} {
				delete(n.records, key)
			}
			entries = append(entries, n)
		}
	}
	return entries, nil
}

// maxRecords is how many records of a list are read at most: another machine, or a
// hostile one, can write any number.
const maxRecords = 4 << 20

// all calls f for every field of a list with its record, some of them twice.
func (e *engine) all(ctx context.Context, l list, f func(field, record string)) error {
	read := 0
	for cursor := "0"; ; {
		scan, err := e.do(ctx, 0, "HSCAN", e.key(l, ""), cursor, "COUNT", strconv.Itoa(page)).AsScanEntry()
		if err != nil {
			return err
		}
		if read += len(scan.Elements) / 2; read > maxRecords {
			return fmt.Errorf("list %s has more than %d records", l, maxRecords)
		}
		for pair := range slices.Chunk(scan.Elements, 2) {
			if len(pair) == 2 {
				f(pair[0], pair[1])
			}
		}
		if scan.Cursor == 0 {
			return nil
		}
		cursor = strconv.FormatUint(scan.Cursor, 10)
	}
}

// change is a record of this machine's that is sent. The script decides about the
// removal before it.
type change struct {
	field field
	record
}

//go:embed merge.lua
var mergeText string

var mergeScript = valkey.NewLuaScript(mergeText)

// reply is what became of a change.
type reply struct {
	accepted bool
	record   string // what the field has now
}

// send merges at most atOnce changes into a list. It returns a reply for each, and the
// list's epoch and sequence then. now is the engine's time, as far as it is known.
func (e *engine) send(ctx context.Context, l list, changes []change, now int64) (replies []reply, at position, err error) {
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	args := []string{e.node, rand.Text(), logLength, fmt.Sprint(now)}
	for _, c := range changes {
		sign := "+"
		if c.removed {
			sign = "-"
		}
		args = append(args, c.field.String(), sign, fmt.Sprint(c.since), fmt.Sprint(c.until), fmt.Sprint(c.timeout), c.comment)
	}
	keys := []string{e.key(l, ""), e.key(l, ":log"), e.key(l, ":meta")}
	parts, err := mergeScript.Exec(ctx, e.client, keys, args).ToArray()
	if err != nil || len(parts) != 3 {
		return nil, at, orOdd(err)
	}
	texts, err := parts[1].AsStrSlice()
	if err == nil {
		at.sequence, err = parts[0].AsInt64()
	}
	if err == nil {
		at.epoch, err = parts[2].ToString()
	}
	if err != nil || len(texts) != len(changes) {
		return nil, at, orOdd(err)
	}
	for _, text := range texts {
		record, accepted := strings.CutPrefix(text, "y")
		replies = append(replies, reply{accepted, strings.TrimPrefix(record, "n")})
	}
	return replies, at, nil
}

var clearScript = valkey.NewLuaScript(`
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
if now - tonumber(ARGV[4]) > 10000 then return redis.error_reply('LATE the engine did not answer in time') end
now = string.format('%.0f', now)
local epoch = redis.call('HGET', KEYS[3], 'epoch') or ARGV[2]
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[3], 'epoch', epoch, 'format', '1', 'cleared', now)
local sequence = redis.call('HINCRBY', KEYS[3], 'sequence', 1)
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[3], '*', 'epoch', epoch, 'sequence', sequence, 'node', ARGV[1], 'cleared', now)
return now`)

// clear empties a list on all machines.
func (e *engine) clear(ctx context.Context, l list) error {
	// An engine that hangs must not do it long after nobody waits for it.
	now, err := e.now(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	keys := []string{e.key(l, ""), e.key(l, ":log"), e.key(l, ":meta")}
	return clearScript.Exec(ctx, e.client, keys, []string{e.node, rand.Text(), logLength, fmt.Sprint(now)}).Error()
}

var sweepScript = valkey.NewLuaScript(`
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
for _, field in ipairs(ARGV) do
	local ends, removal = string.match(redis.call('HGET', KEYS[1], field) or '', '^[+-] %d+ (%d+) %d+ (%d+) ')
	ends, removal = tonumber(ends or '0'), tonumber(removal or '0')
	if ends ~= 0 and ends <= now and removal + 30 * 24 * 3600 * 1000 <= now then redis.call('HDEL', KEYS[1], field) end
end
return 0`)

// sweep deletes those of some fields whose records do not count any more.
func (e *engine) sweep(ctx context.Context, l list, fields []string) error {
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	return sweepScript.Exec(ctx, e.client, []string{e.key(l, "")}, fields).Error()
}

// evicts reports whether the engine, once its memory is full, throws away keys
// that have no expiry, as ours are. It is false where the engine does not tell.
func (e *engine) evicts(ctx context.Context) bool {
	info, _ := e.do(ctx, 0, "INFO", "memory").ToString()
	return strings.Contains(info, "\nmaxmemory_policy:allkeys-") && !strings.Contains(info, "\nmaxmemory:0\r")
}

// ErrSandbox: nftwld's unit lets it reach no network.
var ErrSandbox = errors.New("nftwld cannot open a network socket")

// sandboxed reports whether RestrictAddressFamilies= leaves out AF_INET. The error of
// a name's lookup does not tell.
func sandboxed() bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	return err == unix.EAFNOSUPPORT
}

// isLate reports whether a script refused to do what was sent too long ago.
func isLate(err error) bool {
	e, ok := valkey.IsValkeyErr(err)
	return ok && strings.HasPrefix(e.Error(), "LATE")
}

// Reasons for which the engine cannot be used, in words that do not change.
const (
	refusedLogin = "login"   // wrong user or password
	refusedKeys  = "acl"     // the user has no permission
	full         = "memory"  // maxmemory is reached
	slow         = "timeout" // no answer in time
	badTLS       = "tls"
	unreachable  = "network"
	sandbox      = "sandbox"  // the unit lets nftwld reach no network
	replica      = "readonly" // a replica answers
	odd          = "engine"   // any other answer
)

// why names the reason of an error.
func why(err error) string {
	if e, ok := valkey.IsValkeyErr(err); ok {
		for prefix, reason := range map[string]string{
			"WRONGPASS": refusedLogin, "NOAUTH": refusedLogin, "NOPERM": refusedKeys, "OOM": full, "READONLY": replica, "BUSY": slow,
		} {
			if strings.HasPrefix(e.Error(), prefix) {
				return reason
			}
		}
		if strings.Contains(e.Error(), "OOM command not allowed") {
			return full
		}
		if strings.Contains(e.Error(), "NOPERM") || strings.Contains(e.Error(), "can't access at least one of the keys") {
			return refusedKeys
		}
		return odd
	}
	var timeout net.Error
	var certificate *tls.CertificateVerificationError
	var header tls.RecordHeaderError
	switch {
	case errors.As(err, &certificate), errors.As(err, &header):
		return badTLS
	case errors.Is(err, ErrSandbox):
		return sandbox
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return slow
	}
	return unreachable
}
