"""Makes random inputs from seeds: for machines without a fuzzer, and for the short run among the tests."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

_INTERESTING = (b"\x00", b"\xff", b"\x7f\xff", b"\x80\x00", b"\r\n", b"\n\n", b":", b".", b"%", b"[", b'"', b"\\u0000")


def mutated(seeds: Sequence[bytes], count: int, *, longest: int = 4096, key: int = 0) -> Iterator[bytes]:
    """Mutated inputs, the seeds first; equal keys give equal inputs."""
    chance = random.Random(key)
    for number in range(count):
        if number < len(seeds):
            yield seeds[number]
            continue
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((1, 1, 2, 4, 16))):
            _change(data, chance, seeds)
        yield bytes(data[:longest])


def _change(data: bytearray, chance: random.Random, seeds: Sequence[bytes]) -> None:
    at = chance.randrange(len(data) + 1)
    end = min(len(data), at + chance.choice((1, 1, 2, 4, 32, 256)))
    match chance.randrange(7):
        case 0:
            data[at : at + 1] = bytes([chance.randrange(256)])
        case 1:
            data[at:at] = chance.randbytes(chance.choice((1, 2, 8)))
        case 2:
            del data[at:end]
        case 3:
            data[at:at] = data[at:end] * chance.choice((1, 2, 40))
        case 4:
            data[at:at] = chance.choice(_INTERESTING)
        case 5:
            other = chance.choice(seeds)
            data[at:] = other[chance.randrange(len(other) + 1) :]
        case _:
            if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
