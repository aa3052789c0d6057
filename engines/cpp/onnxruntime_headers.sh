#!/bin/sh
# The C++ headers of ONNX Runtime, of which no wheel has any: prints their folder.
#   onnxruntime_headers.sh DIR     unpacks them below DIR unless they are installed, or there already
# They come from the package libonnxruntime-dev, which Debian has from 13 on. An older Debian takes them from the newer suite, by an apt
# list of its own: nothing is installed, and the machine's own lists stay as they are.
set -eu
dir=$1
for place in /usr/include/onnxruntime /usr/local/include/onnxruntime "$dir/usr/include/onnxruntime"; do
  if [ -f "$place/onnxruntime_cxx_api.h" ]; then echo "$place"; exit 0; fi
done
mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial" "$dir/parts"
if ! apt-cache policy libonnxruntime-dev 2>/dev/null | grep -q 'Candidate: [0-9]'; then
  source=$(ls /etc/apt/sources.list.d/*.sources | head -1)
  awk '/^[A-Za-z-]+:/ { if ($1 == "Suites:") { print "Suites: trixie"; next } if ($1 == "Components:") { print "Components: main"; next } print } /^$/ { exit }' \
    "$source" > "$dir/parts/newer.sources"
  printf 'Dir::State::lists "%s/lists";\nDir::Cache "%s/cache";\nDir::Etc::sourcelist "/dev/null";\nDir::Etc::sourceparts "%s/parts";\n' "$dir" "$dir" "$dir" > "$dir/apt.conf"
  export APT_CONFIG="$dir/apt.conf"
  apt-get -qq update >&2
fi
(cd "$dir" && apt-get -qq download libonnxruntime-dev >&2 && dpkg-deb -x libonnxruntime-dev_*.deb .)
echo "$dir/usr/include/onnxruntime"
