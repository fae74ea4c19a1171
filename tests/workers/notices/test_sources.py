"""What each cloud says, asked of a stand-in of its metadata service over real HTTP."""

import time
from email.utils import formatdate

import pytest
from support.metadata_services import AwsService, AzureService, GcpService

from millijoule.workers.notices.aws import ACTION_PATH, LIFECYCLE_PATH, REBALANCE_PATH, aws_sources
from millijoule.workers.notices.azure import azure_sources
from millijoule.workers.notices.gcp import gcp_sources
from millijoule.workers.notices.metadata import MetadataError, MetadataService
from millijoule.workers.notices.notice import unix_seconds
from millijoule.workers.notices.providers import detect_provider


@pytest.fixture
def aws():
    with AwsService() as service:
        yield service


@pytest.fixture
def gcp():
    with GcpService() as service:
        yield service


@pytest.fixture
def azure():
    with AzureService() as service:
        yield service


def sources(of, service):
    return of(MetadataService(service.url))


def test_aws_says_nothing_before_a_notice_and_its_time_after(aws):
    spot, rebalance, lifecycle = sources(aws_sources, aws)
    assert [s.look(0.0) for s in (spot, rebalance, lifecycle)] == [None, None, None]
    aws.say(ACTION_PATH, '{"action":"terminate","time":"2017-09-18T08:22:00Z"}')
    notice = spot.look(0.0)
    assert notice.deadline == 1505722920.0
    assert "terminate" in notice.reason
    assert not notice.is_advice
    assert len(aws.tokens) == 1  # one session for all that was asked


def test_aws_rebalance_is_an_advice_and_a_lifecycle_state_an_end(aws):
    _, rebalance, lifecycle = sources(aws_sources, aws)
    aws.say(REBALANCE_PATH, '{"noticeTime":"2020-10-27T08:22:00Z"}')
    aws.say(LIFECYCLE_PATH, "InService")
    assert rebalance.look(0.0).is_advice
    assert lifecycle.look(0.0) is None
    aws.say(LIFECYCLE_PATH, "Terminated")
    assert lifecycle.look(0.0).deadline is None


def test_an_aws_token_that_is_no_longer_taken_is_renewed(aws):
    spot, *_ = sources(aws_sources, aws)
    spot.look(0.0)
    aws.forget_tokens()
    aws.say(ACTION_PATH, '{"action":"stop","time":"2017-09-18T08:22:00Z"}')
    assert "stop" in spot.look(0.0).reason
    assert len(aws.tokens) == 2


def test_gcp_answers_at_once_at_first_and_then_when_it_changes(gcp):
    preempted, maintenance = sources(gcp_sources, gcp)
    assert preempted.look(30.0) is None
    assert maintenance.look(30.0) is None
    began = time.monotonic()
    assert preempted.look(1.0) is None  # nothing changes: the service is what waits
    assert time.monotonic() - began >= 0.9
    gcp.say("/computeMetadata/v1/instance/preempted", "TRUE")
    assert preempted.look(30.0).within_s == 30.0
    gcp.say("/computeMetadata/v1/instance/maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
    assert maintenance.look(30.0) is None
    gcp.say("/computeMetadata/v1/instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    assert maintenance.look(30.0).within_s == 3600.0


def test_an_answer_that_google_did_not_sign_is_none(azure):
    preempted, _ = sources(gcp_sources, azure)
    with pytest.raises(MetadataError):
        preempted.look(0.0)


def test_azure_events_of_this_machine_alone_count_and_are_acknowledged_by_id(azure):
    (events,) = sources(azure_sources, azure)
    assert events.look(0.0) is None
    azure.schedule("of-another", "Preempt", formatdate(2_000_000_000, usegmt=True), ["pool_4"])
    azure.schedule("a-pause", "Freeze", formatdate(2_000_000_000, usegmt=True))
    assert events.look(0.0) is None
    azure.schedule("later", "Terminate", formatdate(2_000_000_500, usegmt=True))
    azure.schedule("sooner", "Preempt", formatdate(2_000_000_030, usegmt=True))
    notice = events.look(0.0)
    assert (notice.event_id, notice.deadline) == ("sooner", 2_000_000_030.0)
    events.acknowledge(notice)
    assert azure.acknowledged == ["sooner"]
    assert events.look(0.0).event_id == "later"


def test_an_azure_event_that_has_begun_has_no_time_any_more(azure):
    (events,) = sources(azure_sources, azure)
    azure.schedule("begun", "Preempt", "")
    assert events.look(0.0).deadline is None


@pytest.mark.parametrize("text", ["no JSON", "[]"])
def test_what_is_no_notice_is_an_error_and_not_a_notice(aws, text):
    spot, *_ = sources(aws_sources, aws)
    aws.say(ACTION_PATH, text)
    with pytest.raises(MetadataError, match="instance-action"):
        spot.look(0.0)


@pytest.mark.parametrize(
    ("stand_in", "name"), [(AwsService, "aws"), (GcpService, "gcp"), (AzureService, "azure")]
)
def test_each_provider_is_known_by_its_answers(stand_in, name):
    with stand_in() as service:
        assert detect_provider(MetadataService(service.url)) == name


def test_where_nobody_answers_there_is_no_provider():
    assert detect_provider(MetadataService("http://127.0.0.1:1")) is None


def test_requests_pass_no_proxy(aws, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert sources(aws_sources, aws)[0].look(0.0) is None


def test_times_in_either_form():
    assert (
        unix_seconds("2017-09-18T08:22:00Z") == unix_seconds("Mon, 18 Sep 2017 08:22:00 GMT") == 1505722920.0
    )
    assert unix_seconds("soon") is None
