"""A machine with another kernel: a qemu guest made from Debian packages, in which tests and commands run.

`image` builds its disks, `machine` boots it, `inside` is what runs in it; `scripts/guest` and `scripts/test night
--kernel 6.1` are the way in. docs/kernels.md says what was found this way.
"""
