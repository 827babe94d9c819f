"""Everything that is recognised by its shape, by name."""

from __future__ import annotations

from services.safety.detectors.base import Detector
from services.safety.detectors.national_ids import NATIONAL_IDS
from services.safety.detectors.pii import PII
from services.safety.detectors.secret_keys import SECRET_KEYS

DETECTORS: dict[str, Detector] = {
    detector.name: detector for detector in (*PII, *NATIONAL_IDS, *SECRET_KEYS)
}
