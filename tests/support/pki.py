"""Authorities and certificates, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path


class Authority:
    """Signs certificates; its own is at `certificate`."""

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._name = name
        self.certificate = directory / f"{name}.crt"
        self._key = directory / f"{name}.key"
        _openssl(
            *["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"],
            *["-nodes", "-days", "30", "-subj", f"/CN={name}"],
            *["-keyout", str(self._key), "-out", str(self.certificate)],
        )

    def issue(self, folder: Path, *names: str, days: int = 7) -> None:
        """Writes tls.crt and tls.key for names, such as `DNS:engine` or `IP:127.0.0.1`, into a
        folder, the certificate first."""
        folder.mkdir(parents=True, exist_ok=True)
        request, extensions = self._directory / "request", self._directory / "extensions"
        extensions.write_text(f"subjectAltName={','.join(names)}\n")
        new_key = self._directory / "key"
        _openssl(
            *["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"],
            *["-subj", "/CN=service", "-keyout", str(new_key), "-out", str(request)],
        )
        _openssl(
            *["x509", "-req", "-in", str(request), "-days", str(days), "-out"],
            *[str(folder / "tls.crt"), "-extfile", str(extensions)],
            *["-CA", str(self.certificate), "-CAkey", str(self._key), "-CAcreateserial"],
        )
        (folder / "tls.key").write_bytes(new_key.read_bytes())


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
