"""The model and its doorways: what batch, stream and endpoint share. Never imports Prefect."""
