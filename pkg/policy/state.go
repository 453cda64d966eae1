package policy

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"nftwl/pkg/config"
)

// The file of a Tracker has magic, the checksum of the rest, the key, the number
// of networks, the number of right attempts, and then these. All numbers are
// little-endian.
const magic = "nftwld-failures-1\n"

// Save writes everything that the Tracker knows. The file has no user names, and
// only addresses that have failed.
func (t *Tracker) Save(w io.Writer) error {
	var body []byte
	put := func(v any) { body, _ = binary.Append(body, binary.LittleEndian, v) } // fails only for other types
	put(t.key)
	put([2]uint32{uint32(len(t.networks)), uint32(len(t.right))})
	for k, n := range t.networks {
		put(k)
		put(n.until)
		put([]uint8{n.bans, 0})
		if n.stolen {
			body[len(body)-1] = 1
		}
		put([]uint16{uint16(len(n.failures)), uint16(len(n.banned))})
		for _, f := range n.failures {
			put(f.attempt)
			put(f.at)
		}
		put(n.banned)
	}
	for k, since := range t.right {
		put(k)
		put(since)
	}
	sum := sha256.Sum256(body)
	for _, part := range [][]byte{[]byte(magic), sum[:], body} {
		if _, err := w.Write(part); err != nil {
			return err
		}
	}
	return nil
}

// maxFile is more than a Tracker at its limits writes.
const maxFile = 128 << 20

// LoadTracker reads what Save wrote. A time in the future, which remains when the
// clock was set back, becomes now.
func LoadTracker(r io.Reader, now time.Time, limits config.Failures) (*Tracker, error) {
	b, err := io.ReadAll(io.LimitReader(bufio.NewReader(r), maxFile))
	if err != nil {
		return nil, err
	}
	head := len(magic) + sha256.Size
	if len(b) < head || string(b[:len(magic)]) != magic {
		return nil, errors.New("not a file of failures that nftwld wrote")
	}
	body := b[head:]
	if sum := sha256.Sum256(body); string(sum[:]) != string(b[len(magic):head]) {
		return nil, errors.New("damaged: the checksum is wrong")
	}
	at := seconds(now)
	t := NewTracker(limits)
	get := func(v any) {
		n, e := binary.Decode(body, binary.LittleEndian, v)
		if e != nil {
			err = fmt.Errorf("too short: %w", e)
		}
		body = body[n:]
	}
	get(t.key)
	var count [2]uint32
	get(&count)
	for ; err == nil && count[0] > 0; count[0]-- {
		var k [16]byte
		var n network
		var small [2]uint8
		var lengths [2]uint16
		get(&k)
		get(&n.until)
		get(&small)
		get(&lengths)
		n.bans, n.stolen = small[0], small[1] != 0
		n.until = min(n.until, at+uint32(limits.Longest/time.Second))
		for ; err == nil && lengths[0] > 0; lengths[0]-- {
			var f failure
			get(&f.attempt)
			get(&f.at)
			f.at = min(f.at, at)
			n.failures = append(n.failures, f)
		}
		n.banned = make([]uint32, lengths[1])
		get(n.banned)
		t.networks[k] = &n
		t.failures += len(n.failures)
	}
	for ; err == nil && count[1] > 0; count[1]-- {
		var k uint64
		var since uint32
		get(&k)
		get(&since)
		t.right[k] = min(since, at)
	}
	if err == nil && len(body) > 0 {
		err = errors.New("too long")
	}
	if err != nil {
		return nil, err
	}
	return t, nil
}
