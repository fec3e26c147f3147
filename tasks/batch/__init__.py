"""Batch scoring, in the order of a run; `flows.batch` has its steps.

- resolve: the run of a call, by `source`, `dataset` and, for text formats, `staging` with `formats` and `json_lines`;
- plan: what a run is tied to, by `chunk_layout`, `memory`, `footer` and `tuning`;
- score: `chunk_scheduler` hands out chunks, `chunk_reader` reads them, `parts` writes what they are scored to;
- publish: the audit of the parts and the commits, to `delta` and by the `manifest`, which readers go by;
- report: the figures, shown by `artifacts`, kept in MLflow by `lineage` and sent to collectors by `open_lineage`; both
  describe input and output by `described_datasets`.

What a caller may choose is in `options`.
"""
