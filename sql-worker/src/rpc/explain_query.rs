//! `ExplainQuery`: the plan of a statement, without running it.

use credbroker_proto::v1::{ExplainQueryRequest, ExplainQueryResponse};

use super::place::place;
use crate::app::{App, Principal};
use crate::error::Failure;

pub(super) async fn run(
    app: &App,
    caller: &Principal,
    request: ExplainQueryRequest,
) -> Result<ExplainQueryResponse, Failure> {
    let place = place(request.target)?;
    let explanation = app.explain(caller, place.source(), &request.sql).await?;
    Ok(ExplainQueryResponse {
        plan: explanation.lines,
        total_cost: explanation.total_cost,
        row_estimate: explanation.row_estimate,
        truncated: explanation.truncated,
    })
}
