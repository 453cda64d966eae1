package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"gopkg.in/yaml.v3"
)

// The file is read as a tree of nodes, and never decoded further: only a node
// knows its line, and an alias is not expanded.

// document returns the root of a text's only YAML document: nil if there is
// nothing but comments.
func document(data []byte) (*yaml.Node, error) {
	for i, line := range slices.Collect(bytes.Lines(data)) {
		if !utf8.Valid(line) {
			return nil, &nodeError{line: i + 1, err: errors.New("not UTF-8")}
		}
	}
	d := yaml.NewDecoder(bytes.NewReader(data))
	var doc, second yaml.Node
	switch err := d.Decode(&doc); {
	case err == io.EOF:
		return nil, nil
	case err != nil:
		return nil, syntaxError(err)
	}
	switch err := d.Decode(&second); {
	case err == nil:
		return nil, at(&second, errors.New("a second YAML document begins; there must be one"))
	case err != io.EOF:
		return nil, syntaxError(err)
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return nil, nil
	}
	return root, nil
}

// syntaxError takes the line out of the text of yaml.v3's error, which has none
// for line 1. The library counts the lines of its scanner from 1, and those of
// its parser from 0 (yaml.go, func fail; parserc.go).
func syntaxError(err error) error {
	text, line := strings.TrimPrefix(err.Error(), "yaml: "), 1
	if number, rest, ok := strings.Cut(strings.TrimPrefix(text, "line "), ": "); ok {
		if n, err := strconv.Atoi(number); err == nil {
			text, line = rest, n
			if slices.Contains(parserErrors, text) {
				line++
			}
		}
	}
	return &nodeError{line: line, err: errors.New(text)}
}

var parserErrors = []string{
	"did not find expected <document start>", "did not find expected node content", "did not find expected '-' indicator",
	"did not find expected key", "did not find expected ',' or ']'", "did not find expected ',' or '}'",
}

// nodeError is an error with the place of its cause.
type nodeError struct {
	line int
	key  string // such as trusted.ipv4; "" for the whole file
	err  error
}

func (e *nodeError) Error() string {
	if e.key == "" {
		return fmt.Sprintf("%d: %v", e.line, e.err)
	}
	return fmt.Sprintf("%d: %s: %v", e.line, e.key, e.err)
}

func (e *nodeError) Unwrap() error { return e.err }

// at adds the line of a node to an error that has none.
func at(n *yaml.Node, err error) error {
	if e := (*nodeError)(nil); err == nil || errors.As(err, &e) {
		return err
	}
	return &nodeError{line: max(n.Line, 1), err: err}
}

// under adds the name and the line of a key to the error of its value.
func under(name *yaml.Node, err error) error {
	if err == nil {
		return nil
	}
	e := *at(name, err).(*nodeError)
	e.key = strings.TrimSuffix(name.Value+"."+e.key, ".")
	return &e
}

// within is under for the first key of a mapping that has one of the names.
func within(m *yaml.Node, err error, names ...string) error {
	for i := 0; i < len(m.Content); i += 2 {
		if slices.Contains(names, m.Content[i].Value) {
			return under(m.Content[i], err)
		}
	}
	return at(m, err)
}

// key is a key that a mapping may have, and what reads its value.
type key struct {
	name string
	read func(*yaml.Node) error
}

// mapping reads the keys of a node.
func mapping(n *yaml.Node, known ...key) error {
	if n.Kind != yaml.MappingNode {
		return errors.New("keys with values are needed, such as timeout: 1d")
	}
	seen := make(map[string]bool)
	for i := 0; i < len(n.Content); i += 2 {
		name, v := n.Content[i], n.Content[i+1]
		if _, err := scalar(name); err != nil {
			return at(name, errors.New("a key must be a plain word"))
		}
		k := slices.IndexFunc(known, func(k key) bool { return k.name == name.Value })
		switch {
		case k < 0:
			var names []string
			for _, k := range known {
				names = append(names, k.name)
			}
			last := len(names) - 1
			return at(name, fmt.Errorf("unknown key %q; the keys are %s and %s", name.Value, strings.Join(names[:last], ", "), names[last]))
		case seen[name.Value]:
			return at(name, fmt.Errorf("key %q stands twice", name.Value))
		}
		seen[name.Value] = true
		if err := known[k].read(v); err != nil {
			return under(name, err)
		}
	}
	return nil
}

// value returns a reader of a single value.
func value[T any](to *T, parse func(string) (T, error)) func(*yaml.Node) error {
	return func(n *yaml.Node) error {
		s, err := scalar(n)
		if err == nil {
			*to, err = parse(s)
		}
		return err
	}
}

// list returns a reader of a list. An error names the item's line.
func list[T any](to *[]T, parse func(string) (T, error)) func(*yaml.Node) error {
	return func(n *yaml.Node) error {
		if n.Kind != yaml.SequenceNode {
			return errors.New("a list is needed, such as [a, b]")
		}
		*to = nil
		for _, item := range n.Content {
			var v T
			if err := value(&v, parse)(item); err != nil {
				return at(item, err)
			}
			*to = append(*to, v)
		}
		return nil
	}
}

// scalar returns the text of a single value. Blocks of text, tags and anchors
// have no use here.
func scalar(n *yaml.Node) (string, error) {
	const blocks = yaml.LiteralStyle | yaml.FoldedStyle | yaml.TaggedStyle
	switch {
	case n.Kind != yaml.ScalarNode, n.Style&blocks != 0, n.Anchor != "":
		return "", errors.New("a single plain value is needed")
	case n.Tag == "!!null":
		return "", errors.New("the value is missing")
	case n.Value == "":
		return "", errors.New("the value is empty")
	}
	return n.Value, nil
}
