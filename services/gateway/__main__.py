"""Runs the gateway: `python -m services.gateway --config meshserve.yaml`."""

from services.gateway.service import GatewayService
from services.runtime.server import run

if __name__ == "__main__":
    run(GatewayService, GatewayService.name)
