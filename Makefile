# Two commands: `make demo` and `make test`. Each sets up what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What installs packages; `INSTALL="uv pip install --python .venv" make test` takes a third of the time.
INSTALL ?= $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check

.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
# Without bytecode, which pip does not make either, each of hundreds of processes would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: demo demo-endpoint demo-modes demo-stream deploy lint types check format clean
.PHONY: ci ci-whole ci-plan test test-batch test-tables test-tasks test-rest test-all test-servers test-endpoints test-flows test-serving test-side-by-side
.PHONY: side-that-waits side-that-computes
.PHONY: test-machines test-targets test-workers test-deployments test-nights test-image
.PHONY: simulate simulate-fleet chaos bench-batch bench-peers bench-resume bench-generation bench-gpu bench-spot bench-nightly bench-workers bench-endpoint bench-stream
.PHONY: lock audit sbom image bench-modes bench-memory bench-keys bench-isolation bench-start bench-triton-starts size pictures docs diagrams notebooks

$(STAMP): pyproject.toml constraints.txt infra/local/wheels.txt tests/wheels.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, got %d.%d; set PYTHON=" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --no-deps --require-hashes -r infra/local/wheels.txt -r tests/wheels.txt
	$(INSTALL) -c constraints.txt -e '.[dev]'
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

# CI on HEAD, in a fresh clone with a new environment, on two cores that do nothing else: all tests of values, and those with
# servers or machines that the change since the last whole run can reach. A commit that passes is written into .git/ci-passed.
ci:
	@.ci/run-clean

# The same with every test: 35 to 57 minutes. Where it passes, it writes tests/whole_run.json and tests/reads.json, to be
# committed next.
ci-whole:
	@.ci/run-clean --whole

# What `make ci` would run for the work tree as it is, and why: for each file of tests a changed file that it reads.
ci-plan: $(STAMP)
	@$(BIN)/python -m tests.selection

# A group of tests. Each one that fails is run once more in a process of its own, and is unstable where it passes then.
TESTS := $(BIN)/python -m tests.second_look

# What a newcomer runs: lint, types, every test of values, the simulation, and one whole run of each mode on real servers.
test: lint $(STAMP)
	@$(MAKE) -j 4 types $(VALUE_GROUPS)

VALUE_GROUPS := test-batch test-rest test-tasks test-tables
SERVER_GROUPS := test-flows test-serving test-endpoints
MACHINE_GROUPS := test-targets test-workers test-deployments

VALUES := -m "not machines and (not servers or whole)" --durations=20 --

# Delta and Iceberg tables as sources and outputs wait for their disk, and run once the types are checked.
TABLES := $(foreach kind,delta iceberg table upsert,$(wildcard tests/tasks/batch/test_$(kind)*.py))

test-batch: $(STAMP)
	$(TESTS) batch $(VALUES) tests/tasks/batch $(addprefix --ignore=,$(TABLES))

test-tables: $(STAMP)
	$(TESTS) tables $(VALUES) $(TABLES)

test-tasks: $(STAMP)
	$(TESTS) tasks $(VALUES) tests/tasks tests/deployments tests/infra tests/simulation --ignore=tests/tasks/batch

test-rest: $(STAMP)
	$(TESTS) rest $(VALUES) tests --ignore=tests/tasks --ignore=tests/deployments --ignore=tests/infra --ignore=tests/simulation

# Everything: what `make test` has, then tests with real servers, then real workers and machines.
test-all:
	@$(MAKE) test
	@$(MAKE) test-servers
	@$(MAKE) test-machines

# Three processes of tests at a time, since they wait for servers more than they compute; those of one share its Prefect
# servers. Each takes about as long as the others.
test-servers: $(STAMP)
	@$(MAKE) -j 3 $(SERVER_GROUPS)

# All groups but the nights, as CI runs them: those that wait for servers as often as they compute, three at a time, and
# those that only compute in what these leave of the processors.
test-side-by-side: $(STAMP)
	@$(MAKE) -k -j 2 side-that-waits side-that-computes

# Each side has a number of processes of its own, in place of the one that the make above hands down.
OWN_JOBS = MAKEFLAGS="$(filter-out -j% --jobserver-auth=%,$(MAKEFLAGS))"

side-that-waits:
	@$(OWN_JOBS) $(MAKE) -k -j 3 --output-sync=target $(MACHINE_GROUPS) $(SERVER_GROUPS)

side-that-computes:
	@$(OWN_JOBS) nice -n 5 $(MAKE) -k -j 2 --output-sync=target types $(VALUE_GROUPS)

# The files of tests to which a group with servers or machines is limited: CHOSEN=FILE lists them, by default it is not.
LIMIT := $(if $(CHOSEN),--chosen=$(CHOSEN))

SERVERS := $(LIMIT) -m "servers and not machines and not whole" --durations=30 --
KILLS := $(wildcard tests/flows/test_*kills.py) tests/flows/test_stream_kafka.py
ENDPOINTS := $(wildcard tests/flows/test_endpoint*.py) tests/tasks/endpoint

test-endpoints: $(STAMP)
	$(TESTS) endpoints $(SERVERS) tests/deployments $(KILLS) $(ENDPOINTS)

test-flows: $(STAMP)
	$(TESTS) flows $(SERVERS) tests/flows $(foreach path,$(KILLS) $(ENDPOINTS),--ignore=$(path))

test-serving: $(STAMP)
	$(TESTS) serving $(SERVERS) tests $(foreach path,tests/flows tests/deployments tests/tasks/endpoint,--ignore=$(path))

# What takes minutes of real servers and workers, in three processes again; the output of each comes once it has ended.
# Nights have deadlines to keep, and have the machine for themselves.
test-machines: $(STAMP)
	@$(MAKE) -j 3 --output-sync=target $(MACHINE_GROUPS)
	@$(MAKE) test-nights

MACHINES := $(LIMIT) -m machines --timeout 1200 --durations=30 --
IMAGE := tests/infra/test_docker.py
NIGHTS := tests/deployments/test_nightly.py
# The files that have such tests: to import all others takes a group half a minute.
MARKED = $(sort $(shell grep -rl --include='test_*.py' mark.machines tests))
ON_SERVERS := $(addprefix tests/flows/test_,calibration_run.py endpoint_rollout.py on_ray.py)

# BentoML, KServe, MLServer and Ray Serve, the former three in environments of their own, which the first run makes;
# flows on Ray and of endpoints, and what no other group has, such as defects that the simulation is to find.
test-targets: $(STAMP)
	$(TESTS) targets $(MACHINES) $(filter-out tests/deployments/% tests/infra/% tests/flows/%,$(MARKED)) $(ON_SERVERS)

# The image of a worker, built from an empty Debian and put to work: some ten minutes for itself, and no part of the above.
test-image: $(STAMP)
	$(TESTS) image $(MACHINES) $(IMAGE)

# Every point of a drain and of a kill, workers and scorers of streams that are killed, environments of models, traces.
test-workers: $(STAMP)
	$(TESTS) workers $(MACHINES) $(filter-out $(ON_SERVERS),$(filter tests/flows/%,$(MARKED)))

# Workers and schedules of Prefect, nights that start their machines, the command line, recipes, a workload that changes
# its mode, and what infra has.
test-deployments: $(STAMP)
	$(TESTS) deployments $(MACHINES) $(filter-out $(NIGHTS) $(IMAGE),$(filter tests/deployments/% tests/infra/%,$(MARKED)))

# A night whose spot machine is taken, and one whose own worker ends.
test-nights: $(STAMP)
	$(TESTS) nights $(MACHINES) $(NIGHTS)

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

# Ten billion rows on a thousand spot workers, planned and published for real, scored in simulated time: some
# twenty minutes.
simulate-fleet: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.fleet

# Two workers under SIGKILL at random times, on the disk and on S3, held against an undisturbed run. SEED=1 for other
# kills, ROWS=10000000 for the synthetic table instead of the flights.
chaos: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.chaos

# Figures: a table, then one JSON object as the last line. ROWS=1000000 for a quick look.
bench-batch: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.batch

.PHONY: bench-models
# scikit-learn, XGBoost, LightGBM, random forest, ONNX and CatBoost: loops by hand, `predict` alone, scoring, whole calls:
# some fifteen minutes. ROWS=200000 ROUNDS=1 for a quick look, MODELS=xgboost,onnx for some.
bench-models: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.models

.PHONY: bench-changed
# What a run costs where 1, 10 or none of 100 files changed, and whether its table is that of a full run: some ten minutes.
bench-changed: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.changed

.PHONY: bench-challengers
# What a challenger costs in a run over its forward passes alone, and the comparison: some two minutes.
bench-challengers: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.challengers

.PHONY: bench-features
# What joining features of 10,000,000 rows costs, in memory and from files, beside polars' join of all: some five minutes.
bench-features: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.features

# The same beside Ray Data, Daft, Spark, sentence-transformers and a loop by hand, each in an environment of its own.
bench-peers: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.peers

# What a resume reads after a kill at 99 %, on the disk (needs strace) and on S3. ROWS=1000000 for a quick look.
bench-resume: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.resume

# Tokens a second of text generation beside transformers' own generate: some ten minutes on two free cores. PROMPTS=48 ROUNDS=1
# SIZES=16,32 for a quick look.
bench-generation: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.generation

# How long the body of a request holds up an event loop, by its shape: some two minutes.
.PHONY: bench-pauses
bench-pauses: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.pauses

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

# Every model server behind the same client (needs wrk), the gateway's cost, abuse, loads from zero, lost requests: some
# forty minutes. SECONDS=2 ROUNDS=1 for a quick look, PARTS=gateway for one of servers, gateway, abuse,
# latency, lost.
bench-endpoint: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.endpoint

# Streams over NATS and Kafka: rows and messages a second, latency, and what kills miss or double. ROWS=400000 and
# MESSAGES=5000 for a quick look.
bench-stream: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.stream

# The choice of a mode: its regret on 200 workloads and the real traces of TRACES=FOLDER, keep-warm, speed, and
# predictions against what happens here. CASES=20 ROWS=1000000 ROUNDS=1 for a quick look, PARTS="regret" for one figure,
# SEEDS=7101-7110 for other workloads.
bench-modes: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.modes

# The memory that a run states beside what it takes, over rows of nine shapes. SCALE=0.2 for a quick look, SHAPES="wide".
bench-memory: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.memory

# The check of 10 and of 100 million keys, and upserts into ROWS rows beside deltalake's merge. KEYS=10000000 for less.
bench-keys: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.keys

# Twenty segfaults, five passes that take too much memory and five that hang, in one run. ROWS=100000 for a quick look.
bench-isolation: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.isolation

# What statistics of columns cost in a run, and how near their quantiles are. ROWS=10000000 for more than 2,000,000.
.PHONY: bench-statistics
bench-statistics: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.statistics

# Seconds of imports and of whole scripts, from the start of a process to its exit. ROUNDS=2 for a quick look.
bench-start: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.start

# Starts of Triton, and how often a process of its Python backend dies in one, by which signal: some fifteen minutes.
# STARTS=20 for a quick look, BUSY=0 without other processes beside.
bench-triton-starts: $(STAMP)
	@$(BIN)/python -m tests.benchmarks.triton_starts

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

# The image of a worker, by Docker; BASE_IMAGE=NAME@sha256:DIGEST, TORCH=cuda, BUILD="--build-context wheels=FOLDER".
image:
	docker build -f infra/docker/Dockerfile $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) \
	  $(if $(TORCH),--build-arg TORCH=$(TORCH)) $(if $(TORCH_INDEX_URL),--build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL)) \
	  $(BUILD) -t overnight-worker .

# Programs that look at packages, in an environment of their own.
TOOLS := .venv-tools
$(TOOLS)/.installed: infra/docker/sbom.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r infra/docker/sbom.txt
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.9,<3' 'uv>=0.9'
	@touch $@

# What the image installs, with hashes, from pyproject.toml and constraints.txt. Hashes of torch-cpu.txt are PyTorch's:
# its index of CPU wheels lists them, and no resolver sees that index here.
IMAGE_EXTRAS := delta environments iceberg openlineage serve stream torch
COMPILE := $(TOOLS)/bin/uv pip compile --quiet --constraints constraints.txt --generate-hashes --universal \
  --python-version 3.11 --no-header --no-annotate --no-emit-index-url
lock: $(TOOLS)/.installed
	$(COMPILE) pyproject.toml $(IMAGE_EXTRAS:%=--extra %) -o $(TOOLS)/all.txt
	echo cyclonedx-bom | $(COMPILE) - -o infra/docker/sbom.txt
	awk '/^[a-z]/ {cuda = /^(torch|triton|nvidia-|cuda-)/} !cuda' $(TOOLS)/all.txt > infra/docker/requirements.txt
	awk '/^[a-z]/ {cuda = /^(torch|triton|nvidia-|cuda-)/} cuda' $(TOOLS)/all.txt > infra/docker/torch-cuda.txt

# Known vulnerabilities of what the image installs. It asks the database of PyPI, and fails for what that does not know.
audit: $(TOOLS)/.installed
	$(TOOLS)/bin/pip-audit --strict --require-hashes --disable-pip $(foreach lock,requirements torch-cuda sbom,-r infra/docker/$(lock).txt)

# An inventory of .venv as CycloneDX in .sbom.json; that of the image is in it, as /opt/overnight/sbom.cdx.json.
sbom: $(STAMP) $(TOOLS)/.installed
	$(TOOLS)/bin/cyclonedx-py environment --validate --output-reproducible --spec-version 1.6 --of JSON -o .sbom.json $(BIN)/python
	@echo "The inventory is in .sbom.json."

clean:
	rm -rf $(VENV) .venv-* .demo .bench .site .sbom.json .tests
