"""TLS in front of a real server: the certificate is checked, and the password goes nowhere else."""

import asyncio
import datetime as dt
import ipaddress
import ssl
import threading
from contextlib import suppress

import pytest

from resilience_kit import StoreUnavailableError
from resilience_kit.fleet.connection import Script
from resilience_kit.waiting import TaskWaiting

x509 = pytest.importorskip("cryptography.x509", reason="makes a certificate; azure-identity brings it")

ONE = Script("one", "return 1")


def ask_in_a_task(connection):
    return asyncio.run(connection.run(TaskWaiting(), ONE, []))


def ask_in_a_thread(connection):
    return connection.run_blocking(ONE, [])


either_way = pytest.mark.parametrize("ask", [ask_in_a_task, ask_in_a_thread], ids=["task", "thread"])


def write_certificate(path):
    """A self-made certificate for 127.0.0.1, and its key, in one file."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "store")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )


@pytest.fixture
def tls(own_server, tmp_path):
    """End TLS in front of the test's own server, which cannot do it itself. Gives the port and the certificate."""
    certificate = tmp_path / "store.pem"
    write_certificate(certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    started, state = threading.Event(), {}

    async def pass_on(reader, writer):
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader, writer):
        other_reader, other_writer = await asyncio.open_connection("127.0.0.1", own_server.port)
        await asyncio.gather(pass_on(reader, other_writer), pass_on(other_reader, writer))
        for it in (writer, other_writer):
            with suppress(OSError):
                await it.wait_closed()

    async def serve():
        state["loop"], state["end"] = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
        state["port"] = server.sockets[0].getsockname()[1]
        started.set()
        await state["end"].wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait(others, timeout=0.5) if others else None

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait()
    yield state["port"], certificate
    state["loop"].call_soon_threadsafe(state["end"].set)
    thread.join()


@either_way
def test_a_store_is_reached_over_tls(connect, tls, ask):
    port, certificate = tls
    connection = connect(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}", deadline=5)
    assert ask(connection) == 1
    connection.close()


@either_way
def test_a_certificate_that_nobody_vouches_for_is_refused(connect, tls, ask):
    port, _ = tls
    with pytest.raises(StoreUnavailableError, match=r"(?i)certificate"):
        ask(connect(f"rediss://127.0.0.1:{port}", deadline=5))


@either_way
def test_a_certificate_of_another_host_is_refused(connect, tls, ask):
    port, certificate = tls
    with pytest.raises(StoreUnavailableError, match=r"(?i)certificate"):
        ask(connect(f"rediss://localhost:{port}?ssl_ca_certs={certificate}", deadline=5))


@either_way
def test_a_server_without_tls_is_refused(connect, own_server, ask):
    with pytest.raises(StoreUnavailableError):
        ask(connect(f"rediss://:secret@127.0.0.1:{own_server.port}", deadline=2))


def test_loops_one_after_another_may_use_one_connection_over_tls(connect, tls):
    port, certificate = tls
    connection = connect(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}", deadline=5)
    assert [ask_in_a_task(connection), ask_in_a_task(connection)] == [1, 1]
