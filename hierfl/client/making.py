"""From a plan to a held update: fetch the model, wait for what the update depends on, train, write it down."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from hierfl import observe
from hierfl.client.courier import TRY_AGAIN, Courier
from hierfl.client.folder import ClientFolder
from hierfl.client.held import Held, Work, encode_update
from hierfl.client.link import Link
from hierfl.client.models import FetchedModel
from hierfl.client.offers import check_groups, decline_code
from hierfl.client.residuals import encode_with_feedback
from hierfl.client.site import Site, round_of
from hierfl.client.work import Made, TaskFailed, do_task
from hierfl.errors import HierFLError, NotFound, RoundClosed, StoreDamaged
from hierfl.plan import Plan, task_seed
from hierfl.receipts import Receipt, ReceiptState
from hierfl.types import Float32Array, TaskKind
from hierfl.wire import transfer

__all__ = ["Maker"]

RESIDUAL_WAIT_S = 10.0
"""So long an update with error feedback waits for the last word on the one before; then it goes without."""
ASK_AGAIN_S = 0.5


class Maker:
    """See the module. One client's."""

    def __init__(
        self,
        site: Site,
        folder: ClientFolder,
        link: Link,
        courier: Courier,
        say: Callable[[str], None],
        take_up: Callable[[Receipt], None],
    ) -> None:
        """``take_up``: what the client does with a receipt that was asked for here."""
        self.site, self.folder, self.link, self.courier, self.say = site, folder, link, courier, say
        self.client, self.updates = link.client, folder.updates
        self._take_up = take_up
        self._last_word = asyncio.Event()

    def heard_last_word(self) -> None:
        """On any update of this client: another may have waited for it."""
        self._last_word.set()

    async def make(self, plan: Plan, started: Callable[[], None]) -> tuple[Held, transfer.Outgoing]:
        """Fetch, train, hold. The update is durable when this returns.

        Args:
            started: Called when user code begins.
        Raises:
            TaskFailed: With the code to decline with.
            RoundClosed: The combiner has the model no more.
            StorageError: It cannot be held.
        """
        site, work = self.site, Work.of(plan)
        model = await self._model(plan)
        feedback = plan.task.update_encoding.feedback and await self._settle(work)

        def begin() -> None:
            started()
            self.say(f"{round_of(plan.key)}: {'training' if plan.task.kind is TaskKind.TRAIN else 'evaluating'}")

        def make() -> tuple[Made, Held, transfer.Outgoing]:
            first = site.own_models.local_of(site.policy.app, plan, model.layout)
            local = {**first, **self.folder.local.load(plan.run, plan.round)}
            made = do_task(site.policy.app, plan, model.layout, model.vectors, local, site.site_config, self.client)
            return made, *self._hold(plan, work, made, local, feedback=feedback)

        made, held, outgoing = await site.worker.run(make, begin)
        self.say(f"{round_of(plan.key)}: {'; '.join(made.said) or 'nothing to evaluate here'}")
        return held, outgoing

    async def _settle(self, work: Work) -> bool:
        """Wait for the last word on the update that carries the run's residual; whether there is no such update now.

        The run has moved on, so the word is there, or near: what the combiner does not know will not be counted.
        """
        try:
            async with asyncio.timeout(RESIDUAL_WAIT_S):
                while (carrier := self.updates.carrier(work)) is not None:
                    self._last_word.clear()
                    if await self.is_unknown(carrier):
                        self.updates.residual(carrier.work).unlink(missing_ok=True)
                    elif self.updates.carrier(work) is not None:
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(self._last_word.wait(), ASK_AGAIN_S)
        except TimeoutError:
            self.say(f"round {work.round}: no last word on the update before; what that one left out waits")
            return False
        return True

    async def is_unknown(self, held: Held) -> bool:
        """Ask about an update and take up its receipt; whether the combiner has none."""
        await self.link.wait_until_up()
        try:
            receipts = await self.link.receipts([held.key])
        except TRY_AGAIN:
            return False
        for receipt in receipts:
            self._take_up(receipt)
        return all(receipt.state is ReceiptState.OFFERED for receipt in receipts)

    def _hold(
        self, plan: Plan, work: Work, made: Made, local: Mapping[str, np.ndarray], *, feedback: bool
    ) -> tuple[Held, transfer.Outgoing]:
        """On the worker's thread. Local tensors first: a crash before the update is held repeats the round."""
        wire, left_out = self._encode(plan, made, feedback=feedback)
        encoding = plan.task.encoding.name
        outgoing = encode_update(plan.base.layout_hash, wire, made.head, encoding)
        if plan.task.kind is TaskKind.TRAIN:
            self.folder.local.save(plan.run, plan.round, {**local, **made.local})
        held = Held(
            work=work,
            attempt=plan.attempt,
            digest=outgoing.digest,
            layout_hash=plan.base.layout_hash,
            vectors=outgoing.descriptor.vectors,
            head=made.head,
            state=ReceiptState.OFFERED,
            made_unix_ns=time.time_ns(),
            hold_s=plan.hold_s,
            encoding=encoding,
        )
        self.updates.save(held, wire, left_out)
        return held, outgoing

    def _encode(
        self, plan: Plan, made: Made, *, feedback: bool
    ) -> tuple[dict[str, np.ndarray], dict[str, Float32Array] | None]:
        """The update's wire vectors, and what they leave out, where the update carries its run's residual."""
        encoding, groups = plan.task.update_encoding, plan.task.groups
        residual: Mapping[str, Float32Array] | None = None
        if feedback:
            try:
                residual = self.folder.residuals.load(plan.run, encoding, groups)
            except StoreDamaged as error:
                residual = {}
                self.say(str(error))
        seed = task_seed(plan.seed, plan.round, self.client)
        return encode_with_feedback(encoding, groups, made.vectors, seed, residual)

    async def _model(self, plan: Plan) -> FetchedModel:
        known = self.site.models.known(plan)
        model = known or await self._fetch(plan)
        try:
            check_groups(plan, model.layout)
        except HierFLError as error:
            raise _unusable(error) from None
        return model

    async def _fetch(self, plan: Plan) -> FetchedModel:
        with observe.span(observe.SPAN_MODEL_FETCH, run=plan.run, round=plan.round, site=self.client.site):
            fetch = partial(self.link.fetch_model, fetcher=self.site.models.fetcher(plan.base.model_hash))
            try:
                return await self.courier.patiently(
                    lambda: self.site.models.get(plan, fetch), f"{round_of(plan.key)}: no model yet"
                )
            except NotFound as error:  # a combiner has the models of its open rounds
                raise RoundClosed(str(error)) from None
            except HierFLError as error:
                raise _unusable(error) from None


def _unusable(error: HierFLError) -> TaskFailed:
    return TaskFailed(decline_code(error), f"the model cannot be used: {error}")
