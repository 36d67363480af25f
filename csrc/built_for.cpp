// SPDX-License-Identifier: MIT
// The torch that this extension was built for, as setup.py names it. fastdiff/built_for.py looks for these words in
// the file before it loads it: beside another torch the extension could crash before it says anything.
[[gnu::used]] static const char built_for[] = "fastdiff._C was built for <" FASTDIFF_BUILT_FOR ">";
