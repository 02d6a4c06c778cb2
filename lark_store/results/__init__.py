"""Records returned by the API besides polars frames: frozen dataclasses."""

from lark_store.results.answers import SIGNIFICANT, Hit, Hits, ScoreMatrix, Trace
from lark_store.results.explanations import ExplainedToken, Explanation
from lark_store.results.records import (
    BackupInfo,
    CheckpointInfo,
    CheckpointRun,
    Chosen,
    CorrectionInfo,
    Inventory,
    NewText,
    OnProgress,
    Progress,
    RenderedSample,
    SketcherInfo,
    SnapshotInfo,
    SourceReport,
    StoreStatus,
    VariantInfo,
)
from lark_store.results.reports import EifReport, IngestReport, PlanReport, ProbeReport, RepairReport, SurvivalReport
from lark_store.results.tabular import Convertible, Tabular

__all__ = [
    "SIGNIFICANT",
    "BackupInfo",
    "CheckpointInfo",
    "CheckpointRun",
    "Chosen",
    "Convertible",
    "CorrectionInfo",
    "EifReport",
    "ExplainedToken",
    "Explanation",
    "Hit",
    "Hits",
    "IngestReport",
    "Inventory",
    "NewText",
    "OnProgress",
    "PlanReport",
    "ProbeReport",
    "Progress",
    "RenderedSample",
    "RepairReport",
    "ScoreMatrix",
    "SketcherInfo",
    "SnapshotInfo",
    "SourceReport",
    "StoreStatus",
    "SurvivalReport",
    "Tabular",
    "Trace",
    "VariantInfo",
]
