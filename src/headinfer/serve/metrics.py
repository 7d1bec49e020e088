"""GET /metrics: the figures of the service, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from anyio import to_thread
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from headinfer.serve.service import Service

__all__ = ["metrics_routes"]


def metrics_routes(service: Service) -> APIRouter:
    """Return the route of the metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(service))
    router = APIRouter()

    @router.get("/metrics")
    async def metrics() -> Response:
        text = await to_thread.run_sync(generate_latest, registry)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


class _Figures(Collector):
    """The state of a service as metrics, read when they are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        state = self._service.state()
        yield InfoMetricFamily("headinfer_model", "The model that is served.", value={"name": state.model})
        yield _gauge("context_limit_tokens", "Tokens that the model was made for.", state.context_limit)
        kv = GaugeMetricFamily("headinfer_kv_bytes", "Bytes of KV by place.", labels=["place"])
        for place, count in (
            ("device", state.device_kv_bytes),
            ("host", state.host_kv_bytes),
            ("disk", state.disk_kv_bytes),
        ):
            kv.add_metric([place], count)
        yield kv
        yield _gauge("device_kv_budget_bytes", "Most bytes of KV on the device.", state.device_kv_budget_bytes)
        requests = GaugeMetricFamily("headinfer_requests", "Requests, and documents to read.", labels=["state"])
        requests.add_metric(["waiting"], state.waiting)
        requests.add_metric(["running"], state.running)
        yield requests
        tokens = CounterMetricFamily("headinfer_tokens", "Tokens by kind.", labels=["kind"])
        for kind, count in (
            ("prompt", state.prompt_tokens_total),
            ("cached", state.cached_tokens_total),
            ("completion", state.completion_tokens_total),
        ):
            tokens.add_metric([kind], count)
        yield tokens
        seconds = CounterMetricFamily("headinfer_work_seconds", "Seconds of work by kind.", labels=["kind"])
        seconds.add_metric(["prefill"], state.seconds_prefill_total)
        seconds.add_metric(["decode"], state.seconds_decode_total)
        yield seconds
        yield CounterMetricFamily(
            "headinfer_link_bytes", "Bytes over the link between host and device.", value=state.link_bytes_total
        )
        yield CounterMetricFamily(
            "headinfer_cpu_bytes", "Bytes of KV in host memory that the CPU attended to.", value=state.cpu_bytes_total
        )


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"headinfer_{name}", text, value=value)
