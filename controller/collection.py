"""An attempt while it is open: the plans given out, the answers that came, and what a decision sees of both.

The answers here are exactly those in the store: one is added after its row is durable. The clock is the
registry's; an attempt that was adopted after a restart gets its time anew.
"""

from __future__ import annotations

from collections.abc import Iterable

from controller.planning import plan_for
from controller.registry import Registry
from controller.rows import AnswerRow, AttemptRow, RunRow
from controller.summing import RunningSum
from hierfl import observe
from hierfl.plan import Plan
from hierfl.receipts import Reason
from hierfl.rounds import Answer, AttemptView, Deadline, Presence, RegionView, RoundState
from hierfl.types import RegionId

__all__ = ["Collection", "region_view"]


class Collection:
    """One open attempt of a run."""

    def __init__(
        self, run: RunRow, row: AttemptRow, answers: Iterable[AnswerRow], *, federation: str, opened_at: float
    ) -> None:
        self.row = row
        self.answers = {answer.region: answer for answer in answers}
        self.plans: dict[RegionId, Plan] = {region: plan_for(run, row, region, federation) for region in run.regions}
        self.sum = RunningSum(row.spec.groups)
        self.opened_at = opened_at
        self.span = observe.begin(observe.SPAN_ROUND, run=run.run, task=row.task, round=row.round, attempt=row.attempt)
        self._rules = run.job.round

    @property
    def is_collecting(self) -> bool:
        return self.row.state is RoundState.COLLECTING

    def partials(self, regions: Iterable[RegionId]) -> list[AnswerRow]:
        """The partials of these regions, in the order of their names."""
        return [self.answers[region] for region in sorted(regions) if self.answers[region].digest]

    def counted(self) -> list[AnswerRow]:
        """All partials that came: what a closed attempt adds up."""
        return self.partials(self.answers)

    def view(self, registry: Registry, now: float) -> AttemptView:
        """What ``decide_attempt`` sees at ``now``."""
        return AttemptView(
            min_regions=self._rules.min_regions,
            min_clients=self._rules.min_clients,
            regions=tuple(self._region(registry, region) for region in self.plans),
            deadline=self._deadline(now),
        )

    def next_change(self, registry: Registry, now: float) -> float:
        """When the view changes next although nothing happens: a deadline, or a silence noticed."""
        views = (self._region(registry, region) for region in self.plans)
        live = [view.region for view in views if view.can_answer and view.presence.is_live]
        silences = [registry.live_until(region, self._rules.silence_s) for region in live]
        deadlines = [at for at in (self._passed_at, self._final_at) if at > now]
        return min([*silences, *deadlines], default=now)

    def offer_again_to(self, region: RegionId) -> bool:
        """Whether a region that attaches has this offer to answer."""
        return self.is_collecting and region in self.plans and not self._abstained(region)

    def _abstained(self, region: RegionId) -> bool:
        answer = self.answers.get(region)
        return answer is not None and not answer.digest

    @property
    def _passed_at(self) -> float:
        """A region's own deadline, and ``silence_s`` for it to say that its partial is coming."""
        return self.opened_at + self._rules.report_timeout_s + self._rules.silence_s

    @property
    def _final_at(self) -> float:
        return self._passed_at + self._rules.report_timeout_s

    def _deadline(self, now: float) -> Deadline:
        if now < self._passed_at:
            return Deadline.AHEAD
        return Deadline.PASSED if now < self._final_at else Deadline.FINAL

    def _region(self, registry: Registry, region: RegionId) -> RegionView:
        presence = registry.presence(region, self._rules.silence_s)
        said = self.answers.get(region)
        if said is not None:
            answer = Answer.PARTIAL if said.digest else Answer.ABSTAINED
            phase = "sealed" if said.digest else "abstained"
            return RegionView(region=region, presence=presence, answer=answer, code=said.code, phase=phase)
        progress = registry.progress(region, self.row.key)
        if progress is None:
            return RegionView(region=region, presence=presence)
        return RegionView(
            region=region,
            presence=presence,
            phase=progress.phase,
            clients_ready=progress.clients_ready,
            clients_reported=progress.clients_reported,
            cohort=progress.cohort,
        )


def region_view(registry: Registry, region: RegionId, silence_s: float) -> RegionView:
    """A region between two attempts."""
    presence: Presence = registry.presence(region, silence_s)
    return RegionView(region=region, presence=presence)


def abstention(row: AttemptRow, region: RegionId, code: str, now_unix_ns: int) -> AnswerRow:
    """A region takes no part: said by itself, or by its partial's refusal (``Reason.INVALID``)."""
    return AnswerRow(
        run=row.run,
        task=row.task,
        round=row.round,
        attempt=row.attempt,
        region=region,
        code=code or Reason.POLICY,
        received_unix_ns=now_unix_ns,
    )
