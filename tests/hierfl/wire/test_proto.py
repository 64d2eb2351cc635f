"""The schema: what may cross a border has no message for it that could name or describe one site."""

import pytest
from google.protobuf.descriptor import Descriptor

from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc

SERVICES = pb.DESCRIPTOR.services_by_name
OF_ONE_SITE = {"site", "client", "clients", "sites", "apps", "ticket", "weight_of", "loss"}


def reachable(service: str) -> set[str]:
    """Full names of all messages that a service's calls can carry."""
    found: set[str] = set()
    waiting = [m for method in SERVICES[service].methods for m in (method.input_type, method.output_type)]
    while waiting:
        message: Descriptor = waiting.pop()
        if message.full_name not in found:
            found.add(message.full_name)
            waiting += [field.message_type for field in message.fields if field.message_type]
    return found


def fields(messages: set[str]) -> set[str]:
    return {field.name for name in messages for field in pb.DESCRIPTOR.pool.FindMessageTypeByName(name).fields}


@pytest.mark.parametrize("service", ["ControllerService", "OperatorService"])
def test_no_message_of_the_controller_can_name_or_describe_one_site(service):
    assert not fields(reachable(service)) & OF_ONE_SITE
    for message in ("Receipt", "AdmitRequest", "UploadResponse", "ConnectedClient", "DeclineRequest"):
        assert f"hierfl.v1.{message}" not in reachable(service)


def test_names_of_clients_are_answered_inside_the_region_only():
    naming = {name for name in SERVICES if "hierfl.v1.ConnectedClient" in reachable(name)}
    assert naming == {"RegionOperatorService"}


def test_every_service_begins_with_hello():
    assert all(service.methods[0].name == "Hello" for service in SERVICES.values())


def test_bulk_calls_are_streams_of_raw_frames_and_nothing_else_is():
    raw = {
        (method.name, method.input_type.name == "RawFrame", method.output_type.name == "RawFrame")
        for service in SERVICES.values()
        for method in service.methods
        if "RawFrame" in (method.input_type.name, method.output_type.name)
    }
    uploads = {("Upload", True, False), ("Uplink", True, False), ("UploadModel", True, False)}
    assert raw == uploads | {("FetchModel", False, True)}


def test_deadlines_name_rpcs_that_exist():
    methods = {method.name for service in SERVICES.values() for method in service.methods}
    assert set(rpc.DEADLINES_S) <= methods
