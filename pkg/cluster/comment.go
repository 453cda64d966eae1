package cluster

import (
	"strings"

	"nftwl/pkg/config"
	"nftwl/pkg/nftset"
)

// Every name in a comment is followed by the machine that it comes from:
// "alice @imap1, bob @imap2". In its own sets, a machine leaves its own name out.

// separator is between the names of a comment, as in trust.AddName.
const separator = ", "

// qualify adds a machine's name to those names of a comment that have none. What
// becomes too long is cut.
func qualify(comment, node string) string {
	suffix := "@" + node
	var b strings.Builder
	for i, name := range strings.Split(comment, separator) {
		if _, _, ok := origin(name); !ok {
			if name = strings.TrimRight(strings.TrimSpace(name), " ,"); name != "" { // a comma at the end would separate it
				name = name[:min(len(name), nftset.MaxComment-len(suffix)-1)] + " "
			}
			name += suffix
		}
		if i > 0 {
			name = separator + name
		}
		if b.Len()+len(name) > nftset.MaxComment {
			break
		}
		b.WriteString(name)
	}
	return strings.ToValidUTF8(b.String(), "")
}

// unqualify takes a machine's name out of a comment.
func unqualify(comment, node string) string {
	all := strings.Split(comment, separator)
	for i, name := range all {
		if who, from, ok := origin(name); ok && from == node {
			all[i] = who
		}
	}
	return strings.Join(all, separator)
}

// origin splits a name of a comment: "alice @imap1" is alice's, from imap1.
func origin(name string) (who, node string, ok bool) {
	i := strings.LastIndexByte(name, '@')
	if i < 0 || i > 0 && name[i-1] != ' ' || !config.IsName(name[i+1:]) {
		return name, "", false
	}
	return strings.TrimSuffix(name[:i], " "), name[i+1:], true
}

// ownNames returns those names of a comment that no other machine gave.
func ownNames(comment string) string {
	var own []string
	for name := range strings.SplitSeq(comment, separator) {
		if _, _, ok := origin(name); !ok {
			own = append(own, name)
		}
	}
	return strings.Join(own, separator)
}
