"""Every error of hierfl, each saying whose move it is.

    HierFLError
        ConfigError               the operator's move: key, value, rule
            ConfigErrors          several of them, found in one reading
        NotFound                  what was named does not exist
        ExtraMissing              a package that this command needs is not installed
        AppError                  the app could not be loaded, or broke its contract
        Refused                   not allowed, and asking again changes nothing
            PermissionRefused     this role may not make this call
            ResidencyError        data would leave its zone: stop, never retry
            PolicyRefused         a site's or a zone's policy says no
            RequirementUnknown    the plan requires what this release does not know
        IdentityError             certificates: the operator's or the zone's move
            CertificateMissing    a file of the kit is not there, or not readable
            CertificateExpired    past its life (or this clock is wrong)
            CertificateUntrusted  not signed by the pinned CA, or says another name
        WireError                 a peer's bytes do not fit the schema: reject and count
            VersionMismatch       no protocol version in common
            LayoutMismatch        another model than the plan's
            DigestMismatch        bytes changed on the way, or another digest under a key
            ValueOutOfRange       NaN, infinity, or above the plan's cap
            TransferIncomplete    ended before its last chunk
        Unreachable               nobody answers there: wait, or check address and network
            ComeBack              as many are there as can be: come back after the time given
            NotTheLeader          that controller stands by, or waits for its store: ask the next
        RegionError               confined to one region; the round goes on without it
            RegionUnreachable     retry until the round's deadline
            RegionRejected        do not retry
        RoundClosed               a late partial or update: normal, answered FAILED_PRECONDITION
        StaleEpoch                the sender has been replaced: it must stop
        StorageError              a store or a disk: the operator's move
            DiskFull              no space left, nothing half-written remains
            StoreLocked           another process has it
            StoreTooNew           written by a later release
            StoreDamaged          its contents contradict themselves
            StoreUnreachable      it does not answer, or takes no writes: wait
        PortInUse                 another program listens there
        RunFailed                 a run ended without its model
        AuditMismatch             what is stored contradicts what was signed or counted
        Interrupted               Ctrl-C or SIGTERM: everything was stopped
        InvalidTransition         our bug: state and event in the message; let it surface

``code`` names the error's page in ``ERRORS.md`` (``hierfl explain CODE``); ``exit_code`` is what
the command line returns for it. All arguments go to ``super().__init__`` so that errors survive
pickling (Ray carries them across processes).
"""

from __future__ import annotations

__all__ = [
    "AppError",
    "AuditMismatch",
    "CertificateExpired",
    "CertificateMissing",
    "CertificateUntrusted",
    "ComeBack",
    "ConfigError",
    "ConfigErrors",
    "DigestMismatch",
    "DiskFull",
    "ExtraMissing",
    "HierFLError",
    "IdentityError",
    "Interrupted",
    "InvalidTransition",
    "LayoutMismatch",
    "NotFound",
    "NotTheLeader",
    "PermissionRefused",
    "PolicyRefused",
    "PortInUse",
    "Refused",
    "RegionError",
    "RegionRejected",
    "RegionUnreachable",
    "RequirementUnknown",
    "ResidencyError",
    "RoundClosed",
    "RunFailed",
    "StaleEpoch",
    "StorageError",
    "StoreDamaged",
    "StoreLocked",
    "StoreTooNew",
    "StoreUnreachable",
    "TransferIncomplete",
    "Unreachable",
    "ValueOutOfRange",
    "VersionMismatch",
    "WireError",
]


class HierFLError(Exception):
    """Root of the tree. Subclasses set ``code`` and ``exit_code``; the message is one sentence."""

    code: str = "HFL-000"
    exit_code: int = 1


class ConfigError(HierFLError):
    """A configuration value breaks a rule.

    Args:
        key: Dotted path of the key, such as ``round.min_regions``.
        value: The value found (``None`` where the key is missing or unknown).
        rule: What would be right, as a predicate: ``"must be at least 1"``.
        source: File that the key stands in, if any.
    """

    code = "HFL-101"
    exit_code = 3

    def __init__(self, key: str, value: object, rule: str, source: str = "") -> None:
        super().__init__(key, value, rule, source)
        self.key, self.value, self.rule, self.source = key, value, rule, source

    def __str__(self) -> str:
        where = f"{self.source}: " if self.source else ""
        found = "" if self.value is None else f" = {self.value!r}"
        return f"{where}{self.key}{found} {self.rule}"


class ConfigErrors(ConfigError):
    """All that is wrong with one configuration, so that one reading finds everything."""

    code = "HFL-100"

    def __init__(self, errors: tuple[ConfigError, ...]) -> None:
        first = errors[0]
        super().__init__(first.key, first.value, first.rule, first.source)
        self.errors = errors

    def __reduce__(self) -> tuple[type[ConfigErrors], tuple[tuple[ConfigError, ...]]]:
        return (ConfigErrors, (self.errors,))

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


class NotFound(HierFLError):
    """Args: ``kind`` of thing (``"run"``), its ``name``, and a ``hint`` of what there is instead."""

    code = "HFL-110"
    exit_code = 4

    def __init__(self, kind: str, name: str, hint: str = "") -> None:
        super().__init__(kind, name, hint)
        self.kind, self.name, self.hint = kind, name, hint

    def __str__(self) -> str:
        return f"no {self.kind} {self.name!r}" + (f"; {self.hint}" if self.hint else "")


class ExtraMissing(HierFLError):
    """Args: ``what`` is not there, and the ``requirement`` to install, such as ``hierfl[server]``."""

    code = "HFL-111"
    exit_code = 3

    def __init__(self, what: str, requirement: str) -> None:
        super().__init__(what, requirement)
        self.what, self.requirement = what, requirement

    def __str__(self) -> str:
        return f"{self.what} is not installed here: pip install '{self.requirement}'"


class AppError(HierFLError):
    """The app could not be imported, lacks a function, or returned what it must not."""

    code = "HFL-120"
    exit_code = 3


class Refused(HierFLError):
    """Not allowed; asking again changes nothing."""

    code = "HFL-200"
    exit_code = 5


class PermissionRefused(Refused):
    """This role may not make this call (the table is ``hierfl/wire/access.py``)."""

    code = "HFL-201"


class ResidencyError(Refused):
    """Data would leave its zone. Nothing was sent; never retry."""

    code = "HFL-210"


class PolicyRefused(Refused):
    """A site's or a zone's own policy refuses the plan."""

    code = "HFL-211"


class RequirementUnknown(Refused):
    """The plan requires something this release does not know: an upgrade is needed."""

    code = "HFL-212"


class IdentityError(HierFLError):
    """Something about a certificate or a kit."""

    code = "HFL-300"
    exit_code = 5


class CertificateMissing(IdentityError):
    """A file of the kit is not there or cannot be read."""

    code = "HFL-301"
    exit_code = 3


class CertificateExpired(IdentityError):
    """The certificate is past its life, or not yet in it, or this clock is wrong."""

    code = "HFL-302"


class CertificateUntrusted(IdentityError):
    """Not signed directly by the pinned CA of the region it names, or another name than expected."""

    code = "HFL-303"


class WireError(HierFLError):
    """A peer's bytes do not fit the schema: reject and count."""

    code = "HFL-400"


class VersionMismatch(WireError):
    """The two sides have no protocol version in common: upgrade the older one."""

    code = "HFL-401"


class LayoutMismatch(WireError):
    """Names, shapes, dtypes or roles differ from the run's layout."""

    code = "HFL-410"


class DigestMismatch(WireError):
    """Bytes changed on the way, or another digest came under a key already used."""

    code = "HFL-411"


class ValueOutOfRange(WireError):
    """NaN, infinity, or a magnitude above the plan's cap."""

    code = "HFL-412"


class TransferIncomplete(WireError):
    """A transfer ended before its last chunk."""

    code = "HFL-413"


class Unreachable(HierFLError):
    """Nobody answers at that address; the message says who, where, and what to check."""

    code = "HFL-501"
    exit_code = 6


class ComeBack(Unreachable):
    """The server has as many clients as it takes at once. Args: the sentence, and ``after_s`` to come back after."""

    code = "HFL-502"

    def __init__(self, sentence: str, after_s: float) -> None:
        super().__init__(sentence, after_s)
        self.after_s = float(after_s)

    def __str__(self) -> str:
        return str(self.args[0])


class NotTheLeader(Unreachable):
    """A controller stands by, or waits for its store. Args: the sentence, and the ``leader``, where it is known."""

    code = "HFL-503"
    leader = ""

    def __init__(self, sentence: str, leader: str = "") -> None:
        super().__init__(sentence, leader)
        self.leader = leader

    def __str__(self) -> str:
        return f"{self.args[0]}; {self.leader} leads" if self.leader else str(self.args[0])


class RegionError(HierFLError):
    """Confined to one region; the round goes on without it."""

    code = "HFL-510"


class RegionUnreachable(RegionError):
    """No word from the region: retry until the round's deadline."""

    code = "HFL-511"


class RegionRejected(RegionError):
    """The region, or what it sent, was refused: do not retry."""

    code = "HFL-512"


class RoundClosed(HierFLError):
    """A late update or partial aggregate. Normal; nothing was counted."""

    code = "HFL-520"


class StaleEpoch(HierFLError):
    """The sender has been replaced by a newer one and must stop."""

    code = "HFL-521"


class StorageError(HierFLError):
    """A store or a disk."""

    code = "HFL-600"


class DiskFull(StorageError):
    """No space left on the device; nothing half-written remains."""

    code = "HFL-601"


class StoreLocked(StorageError):
    """Another process holds the store's lock."""

    code = "HFL-602"


class StoreTooNew(StorageError):
    """Written by a later release: upgrade, or restore a backup."""

    code = "HFL-603"


class StoreDamaged(StorageError):
    """The store's contents contradict themselves, or a blob does not have its digest."""

    code = "HFL-604"


class StoreUnreachable(StorageError):
    """The store gives no answer, or takes no writes at present: wait. What was asked of it may have happened."""

    code = "HFL-605"
    exit_code = 6


class PortInUse(HierFLError):
    """Another program listens on the port asked for."""

    code = "HFL-610"
    exit_code = 3


class RunFailed(HierFLError):
    """A run ended without its model; the message gives the reason."""

    code = "HFL-700"


class AuditMismatch(HierFLError):
    """What is stored contradicts what was signed or counted; the report names the rows."""

    code = "HFL-702"
    exit_code = 8


class Interrupted(HierFLError):
    """Ctrl-C or SIGTERM. Everything that this command started was stopped."""

    code = "HFL-701"
    exit_code = 130


class InvalidTransition(HierFLError):
    """An event that the state machine does not know in this state: a bug of ours."""

    code = "HFL-900"

    def __init__(self, machine: str, state: object, event: object) -> None:
        super().__init__(machine, state, event)
        self.machine, self.state, self.event = machine, state, event

    def __str__(self) -> str:
        return f"{self.machine}: no transition from {self.state} on {self.event}"
