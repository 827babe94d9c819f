"""Who calls: the API key, and the tenant it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from services.gateway.context import ANONYMOUS, CallContext, Tenant
from services.gateway.pipeline import Step
from services.runtime.errors import Reason, ServiceError
from services.runtime.settings import ApiKeySettings, GatewaySettings
from services.runtime.telemetry import Metrics

SCHEME = "bearer "


class Authenticator:
    """Knows the keys by their digests, so that none is in memory."""

    def __init__(self, settings: GatewaySettings, metrics: Metrics) -> None:
        auth = settings.auth
        self._denials = metrics.counter("meshserve_gateway_denials")
        self.required = auth.mode == "required" or (auth.mode == "auto" and settings.is_public)
        self.use(auth.keys)
        self._anonymous = Tenant(ANONYMOUS, operator=True)

    def use(self, keys: Iterable[ApiKeySettings]) -> None:
        """Knows these keys from now on, and no others."""
        self._tenants = {
            key.sha256: Tenant(
                key.name,
                frozenset(key.models),
                key.requests_per_minute,
                # Where no key is asked for everybody is, with a key as well as without.
                operator=key.operator or not self.required,
            )
            for key in keys
        }

    def tenant(self, authorization: str | None) -> Tenant:
        """The tenant of an `authorization` header. Raises ServiceError (UNAUTHENTICATED).

        Where no key is asked for, a wrong one is still refused: it is a mistake that should show.
        """
        try:
            return self._tenant_of(authorization)
        except ServiceError as error:
            self._denials.labels(error.reason.value).inc()
            raise

    def _tenant_of(self, authorization: str | None) -> Tenant:
        if not authorization:
            if self.required:
                raise ServiceError(
                    Reason.API_KEY_MISSING, "an API key is needed: authorization: Bearer KEY"
                )
            return self._anonymous
        if not authorization.lower().startswith(SCHEME):
            raise ServiceError(
                Reason.API_KEY_INVALID, "the authorization header must read: Bearer KEY"
            )
        key = authorization[len(SCHEME) :].strip()
        # Looking a digest up tells nothing about the key by its timing.
        tenant = self._tenants.get(hashlib.sha256(key.encode()).hexdigest())
        if tenant is None:
            raise ServiceError(Reason.API_KEY_INVALID, "the API key is not known")
        return tenant

    def operator(self, authorization: str | None) -> Tenant:
        """The same, of somebody who may see the whole mesh. Raises ServiceError (UNAUTHENTICATED,
        PERMISSION_DENIED)."""
        tenant = self.tenant(authorization)
        if not tenant.operator:
            self._denials.labels(Reason.NOT_AN_OPERATOR.value).inc()
            raise ServiceError(
                Reason.NOT_AN_OPERATOR, f"the API key of {tenant.name!r} is not an operator's"
            )
        return tenant


class Authenticate(Step[CallContext]):
    """Sets the tenant."""

    name = "authenticate"

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def before(self, context: CallContext) -> None:
        """Raises ServiceError (UNAUTHENTICATED)."""
        context.tenant = self._authenticator.tenant(context.metadata.get("authorization"))
        context.span.set_attribute("meshserve.tenant", context.tenant.name)
