"""Request ids; what access records say is tested with the sessions that write them."""

from __future__ import annotations

from uuid import RFC_4122, UUID

from usocksd.log.access import request_ids


def test_request_ids_are_uuids_of_version_8_that_never_repeat() -> None:
    ids = []
    for _ in range(1000):  # processes, since a part is random
        make = request_ids()
        first, second = next(make), next(make)
        assert (str(UUID(first)), UUID(first).version, UUID(first).variant) == (first, 8, RFC_4122)
        assert int(UUID(second)) == int(UUID(first)) + 1
        ids += [first, second]
    assert len(set(ids)) == 2000
    ever, always = 0, -1
    for text in ids[::2]:
        ever |= int(UUID(text)) >> 48
        always &= int(UUID(text)) >> 48
    assert (ever & ~always).bit_count() == 74
