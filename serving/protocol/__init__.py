"""The Open Inference Protocol, version 2: `oip` reads requests and writes answers, `v2_app` serves one release by it.

Below them, `oip_body` splits and checks bodies, and `tensors` turns values into arrays and back.
"""
