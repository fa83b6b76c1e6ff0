"""The ADX agent's tool: KQL on a table of request telemetry, here on DuckDB or on a real Azure Data Explorer cluster.

duckdb-kql's KustoClient answers like that of azure-kusto-data, so that only opening differs. Both clients block,
and both may be used by several threads: call `run_kql` through `asyncio.to_thread`.
"""

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import duckdb_kql
from duckdb_kql import kusto as local_kusto

TABLE = "Requests"
REGIONS = ("westeurope", "northeurope", "eastus")
OPERATIONS = ("checkout", "search", "login")

_SAMPLE_DATABASE = "Telemetry"
_SAMPLE_ROWS = 600
_SAMPLE_START = datetime(2025, 1, 1, tzinfo=UTC)
# What a model reads costs tokens: a query that returns more should have summarized.
_MOST_ROWS = 20
# The model's queries read tables, and can neither write nor call out.
_OPTIONS = {
    "request_readonly_hardline": True,
    "request_callout_disabled": True,
    "request_external_data_disabled": True,
    "servertimeout": timedelta(seconds=30),
}


class KustoClient(Protocol):
    """What both Kusto clients do."""

    def execute_query(self, database: str | None, query: str, properties: Any = None) -> Any:
        """Run a KQL query."""
        ...

    def execute_mgmt(self, database: str | None, query: str) -> Any:
        """Run a control command."""
        ...


@dataclass(frozen=True, slots=True)
class Telemetry:
    """An open database: what a query needs, and what the model must know of the tables to write one."""

    client: KustoClient
    database: str
    properties: Any
    tables: str


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One request in the sample table; the fields are its columns."""

    timestamp: datetime
    operation: str
    region: str
    status: int
    latency_ms: float


class QueryError(ValueError):
    """The query cannot be run; the message is written for the model that wrote it."""


def run_kql(telemetry: Telemetry, query: str) -> str:
    """Run a KQL query, and return its rows as a JSON list of objects.

    Raises:
        QueryError: It is a control command, or the database refuses it.
    """
    lines = [line.strip() for line in query.splitlines()]
    statement = " ".join(line for line in lines if line and not line.startswith("//"))
    if not statement or statement.startswith("."):
        raise QueryError("only queries are allowed here, and control commands (with a dot) are not")
    try:
        response = telemetry.client.execute_query(telemetry.database, query, telemetry.properties)
    except Exception as error:  # whatever the database says, the model can mend its query by it
        raise QueryError(f"the query failed: {error}") from error
    rows = [row.to_dict() for row in response.primary_results[0]]
    if len(rows) > _MOST_ROWS:
        raise QueryError(f"{len(rows)} rows are too many to read: summarize, or take {_MOST_ROWS} at most")
    return json.dumps(rows, default=str)


@contextmanager
def open_telemetry(environment: Mapping[str, str] = os.environ) -> Iterator[Telemetry]:
    """Open the cluster in ADX_CLUSTER with its database ADX_DATABASE, or the sample table where there is none."""
    cluster = environment.get("ADX_CLUSTER")
    with _open_cluster(cluster, environment.get("ADX_DATABASE", "")) if cluster else _open_sample() as telemetry:
        yield telemetry


def sample_rows() -> list[SampleRow]:
    """Return the rows of the sample table, always the same: one each minute, some slow and some failed."""
    chance = random.Random(0)  # noqa: S311 - no secret: the same rows each time are the point
    return [
        SampleRow(
            timestamp=_SAMPLE_START + timedelta(minutes=minute),
            operation=chance.choice(OPERATIONS),
            region=chance.choice(REGIONS),
            status=chance.choices((200, 404, 429, 500, 503), weights=(88, 3, 3, 4, 2))[0],
            latency_ms=round(chance.lognormvariate(4.5, 0.6), 1),
        )
        for minute in range(_SAMPLE_ROWS)
    ]


@contextmanager
def _open_sample() -> Iterator[Telemetry]:
    with duckdb_kql.connect(config={"enable_external_access": False}) as connection:
        columns = "Timestamp TIMESTAMPTZ, Operation VARCHAR, Region VARCHAR, Status BIGINT, LatencyMs DOUBLE"
        connection.execute(f"CREATE TABLE {TABLE} ({columns})")
        connection.executemany(
            f"INSERT INTO {TABLE} VALUES (?, ?, ?, ?, ?)",  # noqa: S608 - the table's name is a constant
            [(row.timestamp, row.operation, row.region, row.status, row.latency_ms) for row in sample_rows()],
        )
        yield Telemetry(
            client=local_kusto.KustoClient(connection, allow_write=False),
            database=_SAMPLE_DATABASE,
            properties=_read_only(local_kusto.ClientRequestProperties),
            tables=f"{TABLE}(Timestamp: datetime, Operation: string, Region: string, Status: long, LatencyMs: real)",
        )


@contextmanager
def _open_cluster(cluster: str, database: str) -> Iterator[Telemetry]:
    # Only here is the real client needed; its packages take a second to import.
    from azure.identity import DefaultAzureCredential
    from azure.kusto import data as azure_kusto

    with DefaultAzureCredential() as credential:
        builder = azure_kusto.KustoConnectionStringBuilder.with_azure_token_credential(cluster, credential)
        with azure_kusto.KustoClient(builder) as client:
            yield Telemetry(
                client=client,
                database=database,
                properties=_read_only(azure_kusto.ClientRequestProperties),
                tables=_describe_tables(client, database),
            )


def _describe_tables(client: KustoClient, database: str) -> str:
    """Describe the database's tables, one a line, like the sample's."""
    columns: dict[str, list[str]] = {}
    for row in client.execute_mgmt(database, ".show database schema").primary_results[0]:
        if row["TableName"] and row["ColumnName"]:
            columns.setdefault(row["TableName"], []).append(f"{row['ColumnName']}: {row['ColumnType']}")
    return "\n".join(f"{table}({', '.join(names)})" for table, names in columns.items())


def _read_only(make_properties: Callable[[], Any]) -> Any:
    properties = make_properties()
    for name, value in _OPTIONS.items():
        properties.set_option(name, value)
    return properties
