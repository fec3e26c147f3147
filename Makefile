# Two commands: `make demo` and `make test`. Each sets up what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
.PHONY: demo demo-endpoint demo-modes demo-stream deploy lint types check format clean
.PHONY: test test-flows test-stations test-kills
.PHONY: test-machines test-servers test-workers test-deployments test-nights
.PHONY: simulate chaos bench-batch bench-peers bench-resume bench-gpu bench-spot bench-nightly bench-workers bench-endpoint bench-stream
.PHONY: bench-modes bench-memory bench-start size pictures docs diagrams notebooks

$(STAMP): pyproject.toml constraints.txt infra/local/wheels.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, got %d.%d; set PYTHON=" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r infra/local/wheels.txt
	@touch $@

# The main job on real flights; KILL=1 kills a run twice and compares its bytes with an undisturbed one.
demo: $(STAMP)
	@$(BIN)/python -m deployments.demo $(if $(filter 1,$(KILL)),--kill)

# The same model online, behind Triton and the gateway: asked, a canary promoted, bad versions turned away, asleep, woken.
demo-endpoint: $(STAMP)
	@$(BIN)/python -m deployments.demo.endpoint

# The flights as events into a real NATS server, scored through kills of the scorer and of the server.
demo-stream: $(STAMP)
	@$(BIN)/python -m deployments.demo.stream

# Three ways to consume the model's predictions: the mode that serves each at the lowest cost, and what others waste.
demo-modes: $(STAMP)
	@$(BIN)/python -m deployments.demo.modes $(if $(TRACES),--traces $(TRACES))

# Work pools, deployments and automations on the Prefect server of PREFECT_API_URL; again, it changes nothing.
deploy: $(STAMP)
	@$(BIN)/python -m deployments.apply

# Three processes at a time, since tests wait for servers more than they compute; those of one share its Prefect servers.
test: lint $(STAMP)
	@$(MAKE) -j 3 test-flows test-stations types test-kills

KILLS := $(wildcard tests/flows/test_*kills.py) tests/flows/test_stream_kafka.py

test-flows: $(STAMP)
	$(BIN)/python -m pytest tests/flows $(KILLS:%=--ignore=%)

test-stations: $(STAMP)
	$(BIN)/python -m pytest --ignore=tests/deployments --ignore=tests/flows

# Deployments come first: Prefect's worker of events stays with the first server of a process.
test-kills: $(STAMP)
	$(BIN)/python -m pytest tests/deployments $(KILLS)

# What takes minutes of real servers and workers, in three processes again; the output of each comes once it has ended.
# Nights have deadlines to keep, and have the machine for themselves.
test-machines: $(STAMP)
	@$(MAKE) -j 3 --output-sync=target test-servers test-workers test-deployments
	@$(MAKE) test-nights

MACHINES := $(BIN)/python -m pytest -m machines --timeout 1200 --durations=10
SERVERS := tests/serving tests/infra tests/test_ray_cluster.py tests/flows/test_same_score.py
NIGHTS := tests/deployments/test_nightly.py

# BentoML, KServe, MLServer and Ray Serve, the former three in environments of their own, which the first run makes.
test-servers: $(STAMP)
	$(MACHINES) $(SERVERS)

# Every point of a drain and of a kill, scorers of streams that are killed, defects that the simulation is to find.
test-workers: $(STAMP)
	$(MACHINES) --ignore=tests/deployments $(SERVERS:%=--ignore=%)

# Workers and schedules of Prefect, the command line, recipes, a workload that changes its mode.
test-deployments: $(STAMP)
	$(MACHINES) tests/deployments $(NIGHTS:%=--ignore=%)

# A night whose spot machine is taken, and one whose own worker ends.
test-nights: $(STAMP)
	$(MACHINES) $(NIGHTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: test

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The planner, scorer, publisher and parts of streams over a storage that fails in every way it can, from seeds.
# SEED=123 replays one and prints its steps, SEEDS=2000 for more than 200, FIRST=5000 for others.
simulate: $(STAMP)
	@$(BIN)/python -m tests.simulation

# Two workers under SIGKILL at random times, on the disk and on S3, held against an undisturbed run. SEED=1 for other
# kills, ROWS=10000000 for the synthetic table instead of the flights.
chaos: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.chaos

# Figures: a table, then one JSON object as the last line. ROWS=1000000 for a quick look.
bench-batch: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.batch

# The same beside Ray Data, Daft, Spark, sentence-transformers and a loop by hand, each in an environment of its own.
bench-peers: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.peers

# What a resume reads after a kill at 99 %, on the disk (needs strace) and on S3. ROWS=1000000 for a quick look.
bench-resume: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.resume

# Whole runs over passes alone on the card; says so where there is none.
bench-gpu: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.gpu

# Whole nights on two pools, whose spot machines come and go as a trace says: some nine minutes. Leaves the changeover
# that it measures for bench-spot.
bench-nightly: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.nightly

# Several flow runs on one run: the rows that are scored twice, with one killed and one added: some ten minutes.
bench-workers: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.workers

# What a deadline costs on spot: greedy, Uniform Progress, ours and the optimum. TRACES=FOLDER for real traces of spot,
# else generated ones.
bench-spot: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.spot

# Every model server behind the same client (needs wrk), the gateway's cost, wakes, lost requests: some twenty minutes.
# SECONDS=2 ROUNDS=1 for a quick look, PARTS=gateway for one of servers, gateway, lost.
bench-endpoint: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.endpoint

# Streams over NATS and Kafka: rows and messages a second, latency, and what kills miss or double. ROWS=400000 and
# MESSAGES=5000 for a quick look.
bench-stream: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.stream

# The choice of a mode: its regret on 200 workloads and the real traces of TRACES=FOLDER, keep-warm, speed, and
# predictions against what happens here. CASES=20 ROWS=1000000 ROUNDS=1 for a quick look, PARTS="regret" for one figure.
bench-modes: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.modes

# The memory that a run states beside what it takes, over rows of nine shapes. SCALE=0.2 for a quick look, SHAPES="wide".
bench-memory: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.memory

# Seconds of imports and of whole scripts, from the start of a process to its exit. ROUNDS=2 for a quick look.
bench-start: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.start

# Modules and lines by package, and words that stop a reader. The last line is one JSON object.
size: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.size

# The pictures of the README, out of a real run of the demo.
pictures: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.pictures

# The site of the documentation in .site, without a network; a broken link fails it.
docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --config-file docs/site/mkdocs.yml
	@echo "Open .site/index.html, or serve it: $(BIN)/python -m http.server --bind 127.0.0.1 --directory .site"

# The Mermaid diagrams of docs/ as pictures for the site, where one has changed. Needs npm and chromium.
diagrams: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.diagrams

# What the notebooks of docs/ print, from a run as it is now.
notebooks: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.notebook

clean:
	rm -rf $(VENV) .venv-* .demo .bench .site
