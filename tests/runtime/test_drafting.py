"""How much is guessed. Oracles: sums by hand; and the seconds of a machine whose clock the test moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from trtc.runtime.drafting import HOLD, MAX_HOLD, Drafting, StepCosts
from trtc.runtime.engine_core import EngineCore
from trtc.runtime.prompt_lookup import Lookup, PromptLookup, Rate, Rates
from trtc.runtime.sampling_params import SamplingParams
from trtc.runtime.step_input import StepInput

from .test_decode_ahead import LoopToy
from .test_prompt_lookup import BigramToy, run
from .toy import ToyExecutor

GREEDY = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
LOOKUP = PromptLookup(1, 4)


def measured(costs: dict[int | None, float], sequences: int = 1) -> StepCosts:
    known = StepCosts()
    for drafted, seconds in costs.items():
        for _ in range(2):  # the first one does not count
            known.measured(sequences, drafted, seconds)
    return known


def test_what_is_not_measured_is_estimated_from_what_is() -> None:
    costs = StepCosts()
    assert costs.plain(1) is None
    costs.measured(1, None, 9.0)
    assert costs.plain(1) is None  # the first is not typical
    costs.measured(1, None, 1.0)
    assert costs.plain(1) == 1.0 and costs.plain(2) is None
    assert costs.of(1)(4) == pytest.approx(1.0 + 4 * StepCosts.SLOPE)
    costs = measured({None: 1.0, 0: 1.2, 2: 1.6})
    assert costs.plain(1) == 1.0 and costs.of(1)(0) == 1.2 and costs.of(1)(3) == 1.6
    assert costs.of(1)(8) == pytest.approx(1.6 + 0.2 * 6)  # 0.2 a token, from 2 to 8
    assert costs.of(1)(1) == pytest.approx(1.2 + 0.05 * 1.2)
    assert measured({None: 1.0, 2: 9.0, 4: 2.0}).of(1)(2) == 2.0  # fewer tokens cost no more


def test_costs_follow_the_machine_and_not_one_bad_moment() -> None:
    costs = measured({None: 1.0})
    costs.measured(1, None, 100.0)
    assert costs.plain(1) == 1.25
    for _ in range(40):
        costs.measured(1, None, 3.0)
    assert costs.plain(1) == pytest.approx(3.0, rel=1e-3)


def test_steps_without_guesses_are_measured_again() -> None:
    costs = measured({None: 1.0, 4: 1.0})
    for _ in range(StepCosts.REFRESH - 1):  # one was measured with a guess already
        assert costs.plain(1) == 1.0
        costs.measured(1, 4, 1.0)
    assert costs.plain(1) is None
    costs.measured(1, None, 1.0)
    assert costs.plain(1) == 1.0


@pytest.mark.parametrize(
    ("costs", "chances", "lengths"),
    [
        ({None: 1.0, 1: 1.0, 2: 1.0, 4: 1.0}, [[0.5, 0.2, 0.1, 0.01]], [4]),  # free
        ({None: 1.0, 1: 1.3, 2: 1.3, 4: 1.9}, [[0.5, 0.2, 0.1, 0.01]], [3]),  # 1.8 / 1.3
        ({None: 1.0, 1: 1.3, 2: 1.3, 4: 1.9}, [[0.2, 0.05]], [0]),
        ({None: 1.0, 1: 1.3}, [[0.33]], [0]),  # 1.33 / 1.3 promises too little
        ({None: 1.0, 1: 1.3, 2: 1.3, 4: 1.9}, [[0.2, 0.05], [0.9, 0.8]], [1, 2]),  # 3.9 / 1.3; all four: 3.95 / 1.9
        ({None: 1.0, 1: 1.3, 2: 1.3, 4: 1.3}, [[0.2, 0.05], [0.9, 0.8]], [2, 2]),
        ({}, [[0.9]], [0]),  # nothing is known of steps without guesses
        ({None: 1.0}, [[], [0.9]], [0, 1]),
    ],
)  # fmt: skip
def test_as_many_as_make_more_tokens_a_second(
    costs: dict[int | None, float], chances: list[list[float]], lengths: list[int]
) -> None:
    drafting = Drafting()
    drafting.costs = measured(costs, len(chances))
    assert drafting.lengths(chances, len(chances)) == lengths


def test_what_was_refused_is_tried_again_one_day() -> None:
    drafting = Drafting()
    drafting.costs = measured({None: 1.0, 1: 2.0})
    refused = 0
    while drafting.lengths([[0.5]], 1) == [0]:
        refused += 1
    assert refused == 34  # 1.05 * 2 * 0.99^n < 1.5
    drafting.costs.measured(1, 1, 2.0)
    assert drafting.lengths([[0.5]], 1) == [0]


def test_longer_guesses_are_tried_again_although_short_ones_pay() -> None:
    """One bad moment has made steps with four guesses look as if they cost more than they do."""
    drafting = Drafting()
    drafting.costs = measured({None: 1.0, 0: 1.0, 1: 1.0, 2: 4.0, 4: 4.0})
    chances = [[0.9, 0.8, 0.7, 0.6]]
    tried = [drafting.lengths(chances, 1)[0]]
    while tried[-1] < 4:
        drafting.costs.measured(1, tried[-1], 1.0)
        tried.append(drafting.lengths(chances, 1)[0])
        assert len(tried) < 200
    assert tried[0] == 1


def test_rates_start_with_what_others_have_seen_and_forget() -> None:
    shared = Rates()
    one = Rates(shared)
    assert one.first.value == shared.first.value == 0.5
    for _ in range(100):
        one.first.add(True)
    assert one.first.value > 0.9 and Rates(shared).first.value > 0.9
    for _ in range(40):
        one.first.add(False)
    assert one.first.value < 0.25 < Rates(shared).first.value
    assert Rate(0.25, 10).value == 0.25


def test_guesses_are_compared_with_what_came() -> None:
    """Of the output only, whether they were tried or not: 1 2 is guessed right twice, then 3 wrong, then 1 right."""
    lookup = Lookup(PromptLookup(1, 8))
    lookup.extend([1, 2, 3, 1])
    before = lookup.rates.first.value
    lookup.extend([1, 2, 3, 1, 2])
    assert lookup.rates.first.value > before and lookup.chances(2)[0] == lookup.rates.then.value
    lookup.extend([1, 2, 3, 1, 2, 9])  # 3 was guessed
    assert lookup.rates.then.value < 0.7 and lookup.chances(2)[0] == lookup.rates.first.value
    match, chances = lookup.likely()
    assert match > 0.5 and len(chances) == 8


@dataclass
class Machine:
    """Seconds of a step: `step` and `token` for each of its tokens; those of the host take `host` more."""

    step: float
    token: float
    host: float
    now: float = 0.0


@dataclass
class TimedToy(LoopToy):
    """Steps that the host starts, and steps that run ahead, on a machine."""

    machine: Machine = field(default_factory=lambda: Machine(1.0, 0.0, 0.0))
    max_seq_len: int = 600
    num_pages: int = 600

    def execute(self, step: StepInput) -> torch.Tensor:
        self.machine.now += self.machine.step + self.machine.token * step.num_tokens
        self.machine.now += 0.0 if self._loops else self.machine.host
        return super().execute(step)

    def _step(self) -> torch.Tensor:
        self._loops = True
        try:
            return super()._step()
        finally:
            self._loops = False

    _loops = False


class TimedBigram(TimedToy):
    _row = BigramToy._row


def seconds(
    toy: Callable[..., ToyExecutor], machine: Machine, lookup: PromptLookup | None, count: int
) -> float:
    core = EngineCore(toy(machine=machine), clock=lambda: machine.now)
    run(core, [([1 + i, 2, 3], replace(GREEDY, prompt_lookup=lookup)) for i in range(count)])
    return machine.now


MACHINES = {
    "reads weights": Machine(1.0, 0.01, 0.05),
    "is short": Machine(1.0, 0.1, 1.0),
    "computes": Machine(0.1, 1.0, 0.05),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", list(MACHINES))
def test_never_markedly_slower(kind: str, count: int) -> None:
    """Texts that do not repeat themselves, on machines where a longer step costs little, or much."""
    plain, looked = (seconds(TimedToy, replace(MACHINES[kind]), lookup, count) for lookup in (None, LOOKUP))
    assert looked <= plain / 0.95


@pytest.mark.parametrize("count", [1, 3])
def test_faster_where_the_text_repeats_itself(count: int) -> None:
    gains = {}
    for kind, machine in MACHINES.items():
        plain, looked = (seconds(TimedBigram, replace(machine), lookup, count) for lookup in (None, LOOKUP))
        gains[kind] = plain / looked
    assert gains["reads weights"] > 2.5
    assert gains["is short"] > 1.2
    assert gains["computes"] > 0.95


def test_a_text_that_begins_to_repeat_itself_is_noticed() -> None:
    """Guesses were wrong for long, and steps run ahead: a horizon later they are tried."""
    drafting = Drafting()
    drafting.costs = measured({None: 1.0, 0: 1.5, 4: 1.6})
    lookup = drafting.lookup(PromptLookup(1, 4))
    tokens = list(range(50))
    for i in range(60):  # what follows a token differs every time
        tokens += [i % 7, 100 + i]
        lookup.extend(tokens)
    holds = []
    for _ in range(6):  # and every no is good for longer: a start costs time
        assert not drafting.pays([(lookup, tokens)], 1)
        holds.append(drafting.hold)
    assert holds == [HOLD, 2 * HOLD, 4 * HOLD, MAX_HOLD, MAX_HOLD, MAX_HOLD]
    for _ in range(HOLD):
        tokens.append(tokens[-3])
    assert drafting.pays([(lookup, tokens)], 1)
    assert drafting.hold < HOLD
