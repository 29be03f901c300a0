"""Which of several teachers answers which prompt, and how the traces tell who did.

Invariants: a prompt goes to the same teachers whenever a job is run again, since rules look at its tags
alone. In a stream, a prompt id is answered by one teacher: where several write about the same prompts to one
stream, each does under an id of its own, ID@TEACHER, so that what one has finished says nothing of others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from lynearm.teacher.prompts import MAX_ID_BYTES, Prompt
from lynearm.wire.errors import ConfigError

TEACHER_TAG = "teacher"
"""Tag of each trace of a job with several teachers: the name of the one that wrote it."""


@dataclass(frozen=True, slots=True)
class RouteRule:
    """Which prompts a teacher is for."""

    teacher: str
    when: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    """By tag: the values allowed; all conditions must hold. Empty: every prompt."""

    def matches(self, tags: Mapping[str, str]) -> bool:
        """Whether a prompt with these tags meets every condition."""
        return all(tags.get(key) in values for key, values in self.when.items())


@dataclass(frozen=True, slots=True)
class RoutingTable:
    """The rules of a job, in their order.

    Raises:
        ConfigError: without rules, for a name that comes twice, or for a rule that no prompt can reach.
    """

    rules: tuple[RouteRule, ...]
    everyone: bool = False
    """Every rule that matches sends the prompt to its teacher, not only the first one."""

    def __post_init__(self) -> None:
        """Check the rules against each other."""
        if not self.rules:
            raise ConfigError("the job names no teacher", "add a [[teacher]] table")
        seen: set[str] = set()
        for number, rule in enumerate(self.rules):
            if rule.teacher in seen:
                raise ConfigError(f"two teachers are named {rule.teacher!r}", "give each a name of its own")
            seen.add(rule.teacher)
            catching = [before.teacher for before in self.rules[:number] if not before.when]
            if catching and not self.everyone:
                raise ConfigError(
                    f"teacher {rule.teacher!r} comes after {catching[0]!r}, which takes every prompt",
                    "put the teacher without `when` last, or ask all of them with assign = 'all'",
                )

    def teachers_for(self, tags: Mapping[str, str]) -> tuple[str, ...]:
        """Names of the teachers that a prompt with these tags goes to; empty for none."""
        matching = tuple(rule.teacher for rule in self.rules if rule.matches(tags))
        return matching if self.everyone else matching[:1]


@dataclass(frozen=True, slots=True)
class PromptRoute:
    """One teacher's part of a job with several."""

    teacher: str
    table: RoutingTable
    names_ids: bool = False
    """Its prompts get ids of their own, ID@TEACHER: others write about the same ones to its stream."""
    vocab_size: int = 0
    """Width of the widest logits among the teachers of its stream; 0 for a stream of its own."""

    def take(self, prompt: Prompt) -> Prompt | None:
        """The prompt as this teacher answers it, tagged with its name; None if it goes to others.

        Raises:
            ConfigError: if its id has no room for the teacher's name.
        """
        if self.teacher not in self.table.teachers_for(prompt.tags):
            return None
        return replace(
            prompt,
            prompt_id=self.prompt_id(prompt.prompt_id),
            tags={**prompt.tags, TEACHER_TAG: self.teacher},
        )

    def apply(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """The prompts of this teacher, in their order; as `take` for each.

        Raises:
            ConfigError: if an id has no room for the teacher's name.
        """
        for prompt in prompts:
            taken = self.take(prompt)
            if taken is not None:
                yield taken

    def prompt_id(self, prompt_id: str) -> str:
        """The id under which this teacher answers a prompt: that of the file, or ID@TEACHER for several.

        Raises:
            ConfigError: if it becomes too long.
        """
        if not self.names_ids:
            return prompt_id
        named = f"{prompt_id}@{self.teacher}"
        if len(named.encode()) > MAX_ID_BYTES:
            raise ConfigError(
                f"prompt id {named[:40]!r}… takes {len(named.encode())} bytes with its teacher, "
                f"at most {MAX_ID_BYTES} may be",
                "use shorter ids, or a shorter name for the teacher",
            )
        return named


def original_prompt_id(prompt_id: str, tags: Mapping[str, str]) -> str:
    """The id that a trace's prompt has in its file: without the teacher that its tags name."""
    teacher = tags.get(TEACHER_TAG)
    return prompt_id.removesuffix(f"@{teacher}") if teacher else prompt_id


def count_routes(table: RoutingTable, prompts: Iterable[Prompt]) -> Counter[str]:
    """How many of the prompts go to each teacher.

    Raises:
        ConfigError: if some go to none, naming the first one and how many there are.
    """
    counts: Counter[str] = Counter()
    lost: Prompt | None = None
    lost_count = 0
    for prompt in prompts:
        teachers = table.teachers_for(prompt.tags)
        counts.update(teachers)
        if not teachers:
            lost = lost or prompt
            lost_count += 1
    if lost is not None:
        tags = ", ".join(f"{key}={value}" for key, value in lost.tags.items())[:80] or "no tags"
        raise ConfigError(
            f"{lost.file}:{lost.line}: prompt {lost.prompt_id!r} ({tags}) matches no teacher's rule, "
            f"{lost_count} prompts in all",
            "add a teacher without `when`, last, for all that is left",
        )
    return counts
