"""The benchmarks behind scripts/bench/ROOM: one package a room, and what they share."""
