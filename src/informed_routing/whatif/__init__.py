"""Workload what-if: metrics of a routed model at many workloads, from prompts of one (truncated importance sampling).

Start at `predict`.
"""

from .lengths import LogNormalLengths, TabulatedLengths
from .metrics import (
    DEFAULT_METRICS,
    MeanMetric,
    Metric,
    QuantileMetric,
    RatioMetric,
    TailMetric,
    TotalMetric,
    metrics_from_sequence,
)
from .predict import Predictor, predict
from .predictions import Prediction, Predictions
from .workloads import (
    AnyWorkload,
    Domain,
    Part,
    Workload,
    WorkloadMixture,
    read_workload,
    read_workloads,
    workload_from_mapping,
    workloads_from_sequence,
)

__all__ = [
    "DEFAULT_METRICS",
    "AnyWorkload",
    "Domain",
    "LogNormalLengths",
    "MeanMetric",
    "Metric",
    "Part",
    "Prediction",
    "Predictions",
    "Predictor",
    "QuantileMetric",
    "RatioMetric",
    "TabulatedLengths",
    "TailMetric",
    "TotalMetric",
    "Workload",
    "WorkloadMixture",
    "metrics_from_sequence",
    "predict",
    "read_workload",
    "read_workloads",
    "workload_from_mapping",
    "workloads_from_sequence",
]
