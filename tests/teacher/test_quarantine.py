"""Which prompts are tried together after a worker died."""

from __future__ import annotations

from lynearm.client.leases import Lease
from lynearm.teacher.quarantine import Quarantine, SuspectGroup, by_lease
from lynearm.wire.work import LeasedPrompt, LeaseKey


def make_lease(number: int, *names: str, samples: int = 1) -> Lease:
    prompts = tuple(LeasedPrompt(place, name, b"", tuple(range(samples))) for place, name in enumerate(names))
    return Lease(LeaseKey(number, 1), prompts)


def names(group: SuspectGroup | None) -> list[str]:
    return [] if group is None else [suspect.prompt.prompt_id for suspect in group.suspects]


def drain(quarantine: Quarantine) -> list[list[str]]:
    found: list[list[str]] = []
    while group := quarantine.next():
        found.append(names(group))
    return found


def test_groups_hold_an_eighth_of_a_batch_across_leases() -> None:
    quarantine = Quarantine(max_batch=24)
    quarantine.admit([make_lease(1, "a", "b"), make_lease(2, "c", "d")])
    assert drain(quarantine) == [["a", "b", "c"], ["d"]]


def test_samples_of_a_prompt_are_never_apart() -> None:
    quarantine = Quarantine(max_batch=24)
    quarantine.admit([make_lease(1, "a", "b", samples=2), make_lease(2, "c", samples=9)])
    assert drain(quarantine) == [["a"], ["b"], ["c"]]


def test_a_group_that_died_is_tried_one_by_one_before_anything_else() -> None:
    quarantine = Quarantine(max_batch=16)
    quarantine.admit([make_lease(1, "a", "b", "c")])
    group = quarantine.next()
    assert group is not None
    assert not group.is_alone
    quarantine.split(group)
    assert drain(quarantine) == [["a"], ["b"], ["c"]]


def test_a_group_that_went_with_its_node_comes_back_first() -> None:
    quarantine = Quarantine(max_batch=8)
    quarantine.admit([make_lease(1, "a", "b")])
    group = quarantine.next()
    assert group is not None
    assert group.is_alone
    quarantine.put_back(group)
    assert len(quarantine) == 2
    assert drain(quarantine) == [["a"], ["b"]]


def test_what_others_got_meanwhile_is_left_to_them() -> None:
    quarantine = Quarantine(max_batch=16)
    lost, kept = make_lease(1, "a"), make_lease(2, "b")
    quarantine.admit([lost, kept])
    lost.is_lost = True
    assert drain(quarantine) == [["b"]]


def test_suspects_are_named_by_lease() -> None:
    quarantine = Quarantine(max_batch=32)
    first, second = make_lease(1, "a", "b"), make_lease(2, "c")
    quarantine.admit([first, second])
    group = quarantine.next()
    assert group is not None
    assert {lease: [one.prompt_id for one in found] for lease, found in by_lease(group.suspects).items()} == {
        first: ["a", "b"],
        second: ["c"],
    }
