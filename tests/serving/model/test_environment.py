"""Environments of models, made by uv from wheels that the tests write; only servers on loopback are asked for any."""

from __future__ import annotations

import base64
import json
import logging
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from filelock import FileLock
from pydantic import ValidationError

from serving.errors import EnvironmentUnusable, ModelUnfit
from serving.model.environment import find_environments, make_environment
from serving.model.requirements import ModelEnvironment, read_model_environment
from serving.model.uv import PackageSource
from tests.model_wheels import write_wheel
from tests.servers import serve_http

pytestmark = pytest.mark.servers

LINES_MAX = 12
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
LOGIN = "reader:pw-of-reader"
ONE = ModelEnvironment(requirements=("tiny-model-lib==1.0",))
LIBRARY = "tiny_model_lib.py"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uv")


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    """A cache of uv that is the tests' own, no retries, and environments in the folder of the test."""
    monkeypatch.setenv("UV_CACHE_DIR", str(cache))
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("OVERNIGHT_ENVIRONMENTS", str(tmp_path / "environments"))


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """Two versions of a package."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for version in ("1.0", "2.0"):
        write_wheel(folder, "tiny_model_lib", version)
    return folder


@pytest.fixture
def make(wheels: Path) -> Callable[..., Path]:
    """make_environment from the folder of wheels alone, without extra packages."""

    def call(environment: ModelEnvironment, **options: object) -> Path:
        given = {"packages": PackageSource(wheels=wheels, offline=True), "extra_requirements": ()}
        return make_environment(environment, **(given | options))  # type: ignore[arg-type]

    return call


def say(interpreter: Path, program: str = "import tiny_model_lib; tiny_model_lib.say()") -> str:
    done = subprocess.run([interpreter, "-I", "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def list_unfinished() -> list[str]:
    return [path.name for path in find_environments().iterdir() if path.name.startswith(".unfinished")]


def find_file(interpreter: Path, name: str) -> Path:
    (found,) = interpreter.parents[1].rglob(name)
    return found


def test_an_environment_is_made_once_for_the_same_packages_and_works_at_its_place(make: Callable[..., Path]) -> None:
    made = make(ONE)
    script = subprocess.run([made.parent / "say-tiny_model_lib"], capture_output=True, text=True, check=True).stdout
    marker = made.parents[1] / "environment.json"
    written = marker.stat().st_mtime_ns

    assert find_environments() == made.parents[2]
    assert ("1.0", "1.0\n", HERE) == (
        say(made),
        script,
        say(made, "import sys; print(sys.version_info[0], sys.version_info[1], sep='.')"),
    )
    assert ["tiny_model_lib-1.0.dist-info"] == json.loads(marker.read_text())["packages"]
    assert (made, written) == (make(ONE), marker.stat().st_mtime_ns)
    assert [] == list_unfinished()


def test_what_an_environment_is_made_from_decides_which_one_it_is(make: Callable[..., Path], wheels: Path) -> None:
    write_wheel(wheels, "other", "1.0")
    made = make(ModelEnvironment(requirements=("tiny-model-lib<2,>=1", "other")))
    same = make(ModelEnvironment(requirements=("other", "Tiny_Model.Lib >=1, <2")))
    bound = make(ModelEnvironment(requirements=("tiny-model-lib",), constraints=("tiny-model-lib<2",)))
    newest = make(ModelEnvironment(requirements=("tiny-model-lib",)))
    patch = make(ModelEnvironment(requirements=("tiny-model-lib",), python=f"{HERE}.99"))

    assert made == same
    assert 4 == len({made, bound, newest, patch})
    assert ["1.0", "1.0", "2.0", "2.0"] == [say(each) for each in (made, bound, newest, patch)]


@pytest.mark.parametrize("python", ["3.10", "3.12", "3.13"])
def test_a_model_of_another_version_of_python_gets_that_version(make: Callable[..., Path], python: str) -> None:
    try:
        made = make(ModelEnvironment(requirements=("tiny-model-lib==1.0",), python=f"{python}.0"))
    except EnvironmentUnusable as error:
        if "must be installed" not in str(error):
            raise
        pytest.skip(f"needs Python {python}: pyenv install {python}, or uv python install {python}")

    assert f"1.0 {python}" == say(
        made, "import sys, tiny_model_lib as t; print(t.VERSION, '.'.join(map(str, sys.version_info[:2])))"
    )


def test_wheels_in_the_folder_of_a_model_are_installed_from_there(make: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "a model/wheels").mkdir(parents=True)
    wheel = write_wheel(tmp_path / "a model/wheels", "own", "3.0")
    (tmp_path / "a model/requirements.txt").write_text("wheels/own-3.0-py3-none-any.whl\ntiny-model-lib==1.0\n")
    first = make(read_model_environment(tmp_path / "a model"))

    assert "3.0 1.0" == say(first, "import own, tiny_model_lib; print(own.VERSION, tiny_model_lib.VERSION)")

    write_wheel(wheel.parent, "own", "3.0", text="VERSION = 'changed'\n")
    second = make(read_model_environment(tmp_path / "a model"))

    assert "changed" == say(second, "import own; print(own.VERSION)")


class TestExtraPackages:
    def test_one_that_the_model_does_not_name_is_added(self, make: Callable[..., Path], wheels: Path) -> None:
        write_wheel(wheels, "reader", "1.0")
        made = make(ONE, extra_requirements=("reader", "tiny-model-lib>=2"))

        assert "1.0 1.0" == say(made, "import reader, tiny_model_lib; print(reader.VERSION, tiny_model_lib.VERSION)")

    def test_a_model_that_names_mlflow_gets_no_second_one(self, make: Callable[..., Path], tmp_path: Path) -> None:
        wheel = write_wheel(tmp_path, "mlflow", "3.0", text="__path__ = []\n")
        with zipfile.ZipFile(wheel, "a") as archive:
            archive.writestr("mlflow/pyfunc.py", "")
            archive.writestr("mlflow/__init__.py", "")
        made = make(ModelEnvironment(wheels=(wheel,)), extra_requirements=("mlflow-skinny",))

        assert ["mlflow-3.0.dist-info"] == json.loads((made.parents[1] / "environment.json").read_text())["packages"]

    def test_one_that_does_not_import_beside_the_models_packages_is_told(
        self, make: Callable[..., Path], wheels: Path
    ) -> None:
        write_wheel(wheels, "reader", "1.0", text="raise ImportError('numpy 2 was built against another')")
        with pytest.raises(ModelUnfit, match="reader must import, got:\n  ImportError: numpy 2 was built") as refused:
            make(ONE, extra_requirements=("reader",))

        assert "Traceback" not in str(refused.value)
        assert [] == [path.name for path in find_environments().iterdir() if path.is_dir()]


class TestDamage:
    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda python: (python.parents[1] / "environment.json").unlink(), "environment.json can't be read"),
            (lambda python: (python.parents[1] / "environment.json").write_text("{}"), "can't be read"),
            (lambda python: python.unlink(), "its interpreter does not start (FileNotFoundError)"),
            (lambda python: find_file(python, LIBRARY).unlink(), f"{LIBRARY} is lost or of another size"),
            (lambda python: find_file(python, LIBRARY).write_text(""), f"{LIBRARY} is lost or of another size"),
            (lambda python: shutil.rmtree(find_file(python, "*.dist-info")), "tiny_model_lib-1.0.dist-info is lost"),
            (lambda python: shutil.rmtree(python.parents[1] / "lib"), "tiny_model_lib-1.0.dist-info is lost"),
        ],
    )
    def test_an_environment_that_lost_something_is_made_again_and_that_is_logged(
        self,
        make: Callable[..., Path],
        caplog: pytest.LogCaptureFixture,
        damage: Callable[[Path], object],
        said: str,
    ) -> None:
        made = make(ONE)
        damage(made)
        caplog.set_level(logging.WARNING)

        assert (made, "1.0") == (make(ONE), say(made))
        told = caplog.messages[0]
        assert f"The environment {made.parents[1]} is damaged and is made again: " in told
        assert said in told

    def test_packages_with_a_file_of_one_name_are_no_damage(self, make: Callable[..., Path], wheels: Path) -> None:
        with zipfile.ZipFile(write_wheel(wheels, "other", "1.0"), "a") as archive:
            archive.writestr(LIBRARY, "VERSION = 'that of another package'\n")
        asked = ModelEnvironment(requirements=("tiny-model-lib==1.0", "other"))
        marker = make(asked).parents[1] / "environment.json"
        written = marker.stat().st_mtime_ns
        make(asked)

        assert written == marker.stat().st_mtime_ns
        assert [LIBRARY] == json.loads(marker.read_text())["differing"]

    def test_what_a_killed_process_left_is_removed(self, make: Callable[..., Path]) -> None:
        place = make(ONE).parents[1]
        place.rename(place.parent / f".unfinished-{place.name}-killed")

        assert "1.0" == say(make(ONE))
        assert [] == list_unfinished()


class TestSeveralAtOnce:
    def test_one_of_several_processes_makes_an_environment_and_the_others_wait(self, wheels: Path) -> None:
        program = (
            "import logging, sys; from pathlib import Path; logging.basicConfig(level='INFO', stream=sys.stderr)\n"
            "from serving.model.environment import make_environment\n"
            "from serving.model.requirements import ModelEnvironment\n"
            "from serving.model.uv import PackageSource\n"
            "packages = PackageSource(wheels=Path(sys.argv[1]), offline=True)\n"
            "asked = ModelEnvironment(requirements=('tiny-model-lib==1.0',))\n"
            "print(make_environment(asked, packages=packages, extra_requirements=()))\n"
        )

        def call(_: int) -> tuple[str, str]:
            command = [sys.executable, "-c", program, str(wheels)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return done.stdout.strip(), done.stderr

        with ThreadPoolExecutor(3) as threads:
            found = list(threads.map(call, range(3)))

        assert 1 == len({path for path, _ in found})
        assert 1 == sum(log.count("is complete") for _, log in found)
        assert "1.0" == say(Path(found[0][0]))

    def test_one_that_waits_too_long_is_told(self, make: Callable[..., Path]) -> None:
        place = make(ONE).parents[1]
        shutil.rmtree(place)
        with (
            FileLock(place.parent / f".{place.name}.lock"),
            pytest.raises(EnvironmentUnusable, match=r"Another process must finish .* within 0\.1 s"),
        ):
            make(ONE, timeout_s=0.1)


@contextmanager
def serve_index(wheels: Path, *, answers: bool = True) -> Generator[str]:
    """Serve wheels as an index of packages that asks for a login; yield its host and port."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not answers:
                ended.wait()
                return
            expected = f"Basic {base64.b64encode(LOGIN.encode()).decode()}"
            allowed = self.headers["Authorization"] == expected
            file = wheels / self.path.rpartition("/")[2]
            links = "".join(f'<a href="/files/{path.name}">{path.name}</a>\n' for path in wheels.iterdir())
            body = file.read_bytes() if file.is_file() else links.encode()
            self.send_response(200 if allowed else 401)
            if not allowed:
                self.send_header("WWW-Authenticate", "Basic")
            self.send_header("Content-Type", "application/octet-stream" if file.is_file() else "text/html")
            self.send_header("Content-Length", str(len(body) if allowed else 0))
            self.end_headers()
            if allowed and self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

    with serve_http(Handler) as port:
        try:
            yield f"127.0.0.1:{port}/simple"
        finally:
            ended.set()


class TestIndex:
    def test_an_index_with_a_login_is_used_and_the_login_is_stored_nowhere(
        self, make: Callable[..., Path], wheels: Path
    ) -> None:
        with serve_index(wheels) as host:
            made = make(ONE, packages=PackageSource(index=f"http://{LOGIN}@{host}"))
            again = make(ONE, packages=PackageSource(index=f"http://other:login@{host}"))
        texts = [path.read_text(errors="replace") for path in made.parents[1].rglob("*") if path.is_file()]

        assert (made, "1.0") == (again, say(made))
        assert f"http://{host}" == json.loads((made.parents[1] / "environment.json").read_text())["index"]
        assert not any("pw-of-reader" in text for text in texts)

    def test_a_login_that_is_refused_is_told_without_its_password(
        self, make: Callable[..., Path], wheels: Path
    ) -> None:
        with (
            serve_index(wheels) as host,
            pytest.raises(EnvironmentUnusable, match=r"(?s)index must answer .*401") as refused,
        ):
            make(ONE, packages=PackageSource(index=f"http://reader:pw-that-is-wrong@{host}"))

        assert "pw-that-is-wrong" not in str(refused.value)
        assert_short(refused.value)

    def test_one_that_can_not_be_reached_is_told_without_its_password(
        self, make: Callable[..., Path], held_port: int
    ) -> None:
        with pytest.raises(EnvironmentUnusable, match=r"(?s)The index must answer .*Connection refused") as refused:
            make(ONE, packages=PackageSource(index=f"http://{LOGIN}@127.0.0.1:{held_port}/simple"))

        assert "pw-of-reader" not in str(refused.value)
        assert_short(refused.value)

    def test_one_that_never_answers_ends_with_the_time_allowed(self, make: Callable[..., Path], wheels: Path) -> None:
        with (
            serve_index(wheels, answers=False) as host,
            pytest.raises(EnvironmentUnusable, match=r"got none when it was over: `uv .*` was still running"),
        ):
            make(ONE, packages=PackageSource(index=f"http://{host}"), timeout_s=2)

        assert [] == list_unfinished()

    def test_the_caller_and_not_the_model_says_where_packages_come_from(
        self, make: Callable[..., Path], wheels: Path
    ) -> None:
        asked = ONE.model_copy(update={"sources": ("--extra-index-url https://***@host/simple",)})
        with pytest.raises(ModelUnfit, match=r"(?s)by the caller, .*https://\*\*\*@host/simple.*packages=\{'index': "):
            make(asked, packages=PackageSource())

        assert make(ONE) == make(asked), "a caller who named a source has said so"

    def test_a_source_is_shown_without_its_index_and_offline_goes_with_no_index(self) -> None:
        assert LOGIN not in repr(PackageSource(index=f"https://{LOGIN}@host/simple"))
        with pytest.raises(ValidationError, match="offline=True asks no network"):
            PackageSource(index="https://host/simple", offline=True)


def assert_short(error: BaseException) -> None:
    lines = str(error).split("\n")

    assert len(lines) <= LINES_MAX
    assert not [line for line in lines if "Traceback" in line]


class TestRefusals:
    def test_packages_that_are_nowhere_are_told_with_the_resolvers_reason(self, make: Callable[..., Path]) -> None:
        asked = ModelEnvironment(requirements=("tiny-model-lib==9.0",))
        with pytest.raises(
            ModelUnfit, match=r"(?s)got:\n  .*no version of tiny-model-lib==9\.0.*packages=\{'index"
        ) as refused:
            make(asked)

        assert_short(refused.value)
        assert [] == list_unfinished()

    def test_packages_that_contradict_each_other_are_told_in_three_lines(
        self, make: Callable[..., Path], wheels: Path
    ) -> None:
        for letter in "abcdefghijkl":
            write_wheel(
                wheels, f"needs_{letter}", "1.0", needs=f"Requires-Dist: tiny-model-lib=={'12'['a' < letter]}\n"
            )
        asked = ModelEnvironment(requirements=tuple(f"needs-{letter}" for letter in "abcdefghijkl"))
        with pytest.raises(ModelUnfit, match=r"got:\n  cause: Because .*tiny-model-lib==1") as refused:
            make(asked)

        assert_short(refused.value)
        assert 3 >= sum(line.startswith("  ") for line in str(refused.value).split("\n"))

    def test_a_model_with_lines_that_are_refused_names_them(self, make: Callable[..., Path], tmp_path: Path) -> None:
        (tmp_path / "requirements.txt").write_text("\n".join(f"https://me:pw@host/{at}.whl" for at in range(20)))
        with pytest.raises(
            ModelUnfit, match=r"(?s)https://\*\*\*@host/0\.whl in requirements\.txt: .*and 15 more"
        ) as refused:
            make(read_model_environment(tmp_path))

        assert "me:pw" not in str(refused.value)
        assert_short(refused.value)

    @pytest.mark.parametrize("python", ["3.5.10", "3.99"])
    def test_a_version_of_python_that_is_nowhere_is_told_beside_those_that_are(
        self, make: Callable[..., Path], python: str
    ) -> None:
        with pytest.raises(
            EnvironmentUnusable, match=rf"logged with Python {python}, .*got these: .*{HERE}\."
        ) as refused:
            make(ModelEnvironment(python=python))

        assert "{'download_python': True}" in str(refused.value)
        assert_short(refused.value)

    def test_without_uv_it_is_told_how_to_install_it(
        self, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setitem(sys.modules, "uv", None)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(EnvironmentUnusable, match=r"pip install 'overnight\[environments\]'"):
            make(ONE)

    def test_a_folder_that_can_not_be_made_is_told(
        self, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("OVERNIGHT_ENVIRONMENTS", str(tmp_path / "file/environments"))
        with pytest.raises(EnvironmentUnusable, match=r"must be writable in .*file/environments, got NotADirectory"):
            make(ONE)

    def test_a_disk_that_is_full_is_told_and_space_ends_it(
        self, make: Callable[..., Path], wheels: Path, tmp_path: Path
    ) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        write_wheel(wheels, "large", "1.0", text=f"DATA = '{'x' * 400_000}'\n")
        asked = ModelEnvironment(requirements=("large",))
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], check=False).returncode:
            pytest.skip("a small disk needs the right to mount: run as root")
        try:
            with pytest.raises(
                EnvironmentUnusable, match=r"(?s)disk.*No space left.*OVERNIGHT_ENVIRONMENTS"
            ) as refused:
                make(asked, folder=disk)
            assert_short(refused.value)
            assert [] == [path.name for path in disk.iterdir() if path.is_dir()]

            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)

            assert "400000" == say(make(asked, folder=disk), "import large; print(len(large.DATA))")
        finally:
            # This process uses the environment, and so its disk, until it ends.
            subprocess.run(["umount", "--lazy", str(disk)], check=True)

    def test_wheels_that_are_in_no_folder_are_told(self, make: Callable[..., Path], tmp_path: Path) -> None:
        with pytest.raises(EnvironmentUnusable, match=r"Wheels must be in a folder, got .*nowhere"):
            make(ONE, packages=PackageSource(wheels=tmp_path / "nowhere"))
