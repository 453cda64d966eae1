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
	for i, line := range bytes.Split(data, []byte("\n")) {
		if !utf8.Valid(line) {
			return nil, fmt.Errorf("%d: not UTF-8", i+1)
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
		return nil, fail(&second, "", "a second YAML document begins; there must be one")
	case err != io.EOF:
		return nil, syntaxError(err)
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return nil, nil
	}
	return root, nil
}

// syntaxError puts the line first in yaml.v3's error, which has none for line 1.
// The library counts the lines of its scanner from 1, and those of its parser from
// 0 (yaml.go, func fail; parserc.go).
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
	return fmt.Errorf("%d: %s", line, text)
}

var parserErrors = []string{
	"did not find expected <document start>", "did not find expected node content", "did not find expected '-' indicator",
	"did not find expected key", "did not find expected ',' or ']'", "did not find expected ',' or '}'",
}

// fail returns an error about a node of the key's value, or about the whole file
// if the key is empty.
func fail(n *yaml.Node, key, format string, args ...any) error {
	text := fmt.Sprintf(format, args...)
	if key != "" {
		text = key + ": " + text
	}
	return fmt.Errorf("%d: %s", max(n.Line, 1), text)
}

// reader reads the value of a key, such as trusted.ipv4. Its errors are fail's.
type reader func(key string, v *yaml.Node) error

// entry is a key that a mapping can have.
type entry struct {
	name string
	read reader
}

// mapping reads a mapping with some of the keys, each at most once.
func mapping(key string, n *yaml.Node, known ...entry) error {
	if n.Kind != yaml.MappingNode {
		return fail(n, key, "keys with values are needed, such as timeout: 1d")
	}
	seen := make(map[string]bool)
	for i := 0; i < len(n.Content); i += 2 {
		name, v := n.Content[i], n.Content[i+1]
		if _, err := scalar(name); err != nil {
			return fail(name, key, "a key must be a plain word")
		}
		k := slices.IndexFunc(known, func(e entry) bool { return e.name == name.Value })
		switch {
		case k < 0:
			var names []string
			for _, e := range known {
				names = append(names, e.name)
			}
			return fail(name, key, "unknown key %q; the keys are %s", name.Value, strings.Join(names, ", "))
		case seen[name.Value]:
			return fail(name, key, "key %q occurs twice", name.Value)
		}
		seen[name.Value] = true
		if err := known[k].read(strings.TrimPrefix(key+"."+name.Value, "."), v); err != nil {
			return err
		}
	}
	return nil
}

// value returns a reader of a single value.
func value[T any](to *T, parse func(string) (T, error)) reader {
	return func(key string, v *yaml.Node) error {
		s, err := scalar(v)
		if err == nil {
			*to, err = parse(s)
		}
		if err != nil {
			return fail(v, key, "%v", err)
		}
		return nil
	}
}

// list returns a reader of a list.
func list[T any](to *[]T, parse func(string) (T, error)) reader {
	return func(key string, v *yaml.Node) error {
		if v.Kind != yaml.SequenceNode {
			return fail(v, key, "a list is needed, such as [a, b]")
		}
		*to = make([]T, len(v.Content))
		for i, item := range v.Content {
			if err := value(&(*to)[i], parse)(key, item); err != nil {
				return err
			}
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
