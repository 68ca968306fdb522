from uuid import RFC_4122, UUID

from usocksd.log.request_id import request_ids


def test_they_are_uuids_of_version_8() -> None:
    # Of many processes, since a part is random.
    for _ in range(1000):
        text = request_ids()()
        uuid = UUID(text)
        assert str(uuid) == text
        assert (uuid.version, uuid.variant) == (8, RFC_4122)


def test_they_never_repeat() -> None:
    ours, theirs = request_ids(), request_ids()
    ids = {make() for make in (ours, theirs) for _ in range(10_000)}
    assert len(ids) == 20_000


def test_those_of_one_process_differ_only_in_their_count() -> None:
    make = request_ids()
    first, second = UUID(make()), UUID(make())
    assert int(second) == int(first) + 1
    assert first.node == 1


def test_the_random_part_uses_all_its_bits() -> None:
    heads = [int(UUID(request_ids()())) >> 48 for _ in range(2000)]
    ever, always = 0, -1
    for head in heads:
        ever |= head
        always &= head
    assert (ever & ~always).bit_count() == 74
