from usocksd.log.seldom import Seldom


def test_said_once_in_a_while_with_how_often_it_was() -> None:
    now = 0.0
    seldom = Seldom(every=10.0, clock=lambda: now)
    assert [seldom.due("a"), seldom.due("a"), seldom.due("b"), seldom.due("a")] == [1, None, 1, None]
    now = 9.9
    assert seldom.due("a") is None
    now = 10.0
    assert [seldom.due("a"), seldom.due("a"), seldom.due("b")] == [4, None, 1]


def test_it_remembers_a_bounded_number() -> None:
    seldom = Seldom(clock=lambda: 0.0)
    assert all(seldom.due(number) == 1 for number in range(5000))
    assert seldom.due(4999) is None
    assert seldom.due(0) == 1
