#!/bin/sh
# Prints a package's version for a version that Go has noted in a binary.
#
#   version.sh deb|rpm|apk VERSION
#
#	v1.2.3                                  1.2.3
#	v1.2.3-rc.1                             1.2.3~rc.1
#	v1.2.4-0.20261121072950-adf3d211f29d    1.2.4~git20261121072950.adf3d21
#
# For Go, a commit after v1.2.3 comes before v1.2.4, and so it does here. In deb and
# rpm "~" sorts before the end. apk has words for that instead, accepts no other
# letters, and only numbers of 32 bits.
set -eu

version=$(echo "${2#v}" | sed -E \
	-e 's/-(0\.)?([0-9]{14})-([0-9a-f]{7})[0-9a-f]*/~git\2.\3/' \
	-e 's/\.0\.([0-9]{14})-([0-9a-f]{7})[0-9a-f]*/.git\1.\2/' \
	-e 's/-/~/g')
[ "$1" != apk ] || version=$(echo "$version" | sed -E \
	-e 's/\+.*//' \
	-e 's/~(alpha|beta|rc)\.?([0-9]*)/_\1\2/' \
	-e 's/~git([0-9]{8})([0-9]{6})\..*/_pre\1_p\2/' \
	-e 's/\.git([0-9]{8})([0-9]{6})\..*/_git\1_p\2/')
echo "$version"
