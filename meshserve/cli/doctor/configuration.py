"""Whether a mesh can be started with the settings, and who could get in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from meshserve.cli.doctor.findings import Finding, ok, problem, warning
from meshserve.supervisor.plan import SERVICES, process_specs
from meshserve.supervisor.ports import AddressError, check_addresses
from meshserve.supervisor.statedir import StateDir
from services.gateway.api_keys import ApiKeys
from services.gateway.stages.authenticate import Authenticator
from services.runtime.file_watch import FilesRefusedError, read_files
from services.runtime.server import StartupError
from services.runtime.settings import Settings
from services.runtime.telemetry import Metrics
from services.runtime.tls.pem import check_pair, check_trusted
from services.runtime.valkey import EmbeddedValkeyError
from services.safety.policy import PolicyError, load_policy

# By then whoever renews certificates has done so, and so does the first alert think.
FEW_DAYS = 14


def addresses(settings: Settings, config: Path | None, state: StateDir) -> Iterator[Finding]:
    """Whether all ports are free. To be asked while no mesh runs here."""
    try:
        specs = process_specs(settings, config, state)
    except EmbeddedValkeyError as error:
        yield problem(str(error), "or set valkey.url to a server that runs already")
        return
    wanted = [address for spec in specs for address in spec.addresses]
    try:
        check_addresses(wanted)
    except AddressError as error:
        for line in str(error).splitlines():
            what, _, way_out = line.partition("; ")
            yield problem(what, way_out)
    else:
        yield ok(f"all {len(wanted)} ports of the mesh are free")


def access(settings: Settings) -> Iterator[Finding]:
    """Who may call the gateway."""
    gateway, metrics = settings.gateway, Metrics("gateway")
    authenticator = Authenticator(gateway, metrics)
    required = authenticator.required
    try:
        keys = ApiKeys(settings, authenticator, metrics).settings.gateway.auth.keys
    except StartupError as error:
        yield problem(error.message, error.hint)
        return
    if not gateway.is_public:
        yield ok("the gateway listens on this machine alone")
        return
    listening = " and ".join(filter(None, (gateway.listen, gateway.http_listen)))
    if required and not keys:
        yield problem(
            f"callers on {listening} need an API key, and none is configured",
            "add one to gateway.auth.keys, as docs/configuration.md shows",
        )
    elif not required:
        yield warning(
            f"whoever reaches {listening} may use the models and see the whole mesh",
            "set gateway.auth.mode to required and add keys, unless something before it asks",
        )
    else:
        yield ok(f"callers on {listening} need one of {len(keys)} API keys")
    if gateway.tls is None:
        yield warning(
            f"prompts, answers and keys reach {listening} in the clear",
            "set gateway.tls, or put a proxy before it that ends TLS",
        )


def certificates(settings: Settings) -> Iterator[Finding]:
    """Whether each service's certificate and key belong together, and how long they are good."""
    for name in SERVICES:
        tls = settings.server(name).tls
        if tls is None:
            continue
        paths = (tls.certificate, tls.private_key, *filter(None, (tls.ca, tls.client_ca)))
        try:
            certificate, key, *trusted = zip(paths, read_files(paths), strict=True)
            expires_at = check_pair(certificate, key)
            for path, content in trusted:
                check_trusted(path, content)
        except FilesRefusedError as error:
            yield problem(
                f"{name}.tls cannot be used: {error}", "docs/tls.md says what each file holds"
            )
            continue
        yield ok(f"the {name}'s certificate and key belong together")
        days = (expires_at - time.time()) / 86400
        if days < FEW_DAYS:
            yield warning(
                f"the {name}'s certificate expires in {days:.1f} days",
                f"renew {tls.certificate}; a service that runs takes it without a restart",
            )


def policies(settings: Settings) -> Iterator[Finding]:
    """Whether the safety filter's policies can be read."""
    if not settings.safety.enabled:
        yield warning("the safety filter is off", "set safety.enabled to true unless that is meant")
        return
    for name, path in settings.safety.policies.items():
        try:
            load_policy(name, path)
        except PolicyError as error:
            for line in str(error).splitlines():
                yield problem(line, "docs/safety.md describes what a policy is made of")
        else:
            yield ok(f"the safety policy {name!r} can be read")
