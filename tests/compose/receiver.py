"""Stands in for the collector: takes spans over OTLP/gRPC and tells over HTTP what came, and
Prometheus how many."""

from __future__ import annotations

import json
import threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service_grpc
from prometheus_client import Counter, start_http_server

OTLP_PORT = 4317
HTTP_PORT = 4318
METRICS_PORT = 8888

lock = threading.Lock()
traces: dict[str, list[dict[str, Any]]] = {}
# As the collector's own; what comes here is sent nowhere.
accepted = Counter(
    "otelcol_receiver_accepted_spans", "Spans that were taken.", ["receiver", "transport"]
).labels("otlp", "grpc")


class Receiver(service_grpc.TraceServiceServicer):
    """Keeps the spans of each trace."""

    def Export(self, request: Any, context: Any) -> Any:
        with lock:
            for resource_spans in request.resource_spans:
                service = next(
                    pair.value.string_value
                    for pair in resource_spans.resource.attributes
                    if pair.key == "service.name"
                )
                for scope_spans in resource_spans.scope_spans:
                    accepted.inc(len(scope_spans.spans))
                    for span in scope_spans.spans:
                        traces.setdefault(span.trace_id.hex(), []).append(
                            {
                                "service": service,
                                "name": span.name,
                                "id": span.span_id.hex(),
                                "parent": span.parent_span_id.hex(),
                            }
                        )
        return service_pb2.ExportTraceServiceResponse()


class Pages(BaseHTTPRequestHandler):
    """GET /TRACE_ID gives the spans of a trace as JSON."""

    def do_GET(self) -> None:
        with lock:
            body = json.dumps(traces.get(self.path.strip("/"), [])).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


if __name__ == "__main__":
    server = grpc.server(futures.ThreadPoolExecutor(8))
    service_grpc.add_TraceServiceServicer_to_server(Receiver(), server)
    server.add_insecure_port(f"0.0.0.0:{OTLP_PORT}")
    server.start()
    start_http_server(METRICS_PORT)
    ThreadingHTTPServer(("0.0.0.0", HTTP_PORT), Pages).serve_forever()
