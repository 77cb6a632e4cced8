//! Parameters of every type, positional and named.

use credbroker_sql_worker::sql::{Answer, Params};
use serde_json::{Value, json};

use crate::cluster::{Cluster, rows, run};

fn named(value: Value) -> Params {
    Params::Named(serde_json::from_value(value).unwrap())
}

#[tokio::test]
async fn a_value_gets_the_type_that_the_database_infers() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    let cases = [
        ("$1::int4 + 1", json!(41), json!(42)),
        ("$1::int8", json!("9007199254740993"), json!("9007199254740993")),
        ("$1::numeric", json!("1.10"), json!("1.10")),
        ("$1::bool", json!(true), json!(true)),
        ("$1::float8", json!("NaN"), json!("NaN")),
        ("$1::text", json!("o'brien \\ \"x\" $$"), json!("o'brien \\ \"x\" $$")),
        ("$1::text", json!(null), json!(null)),
        ("$1::char(4)", json!("abc"), json!("abc ")),
        ("$1::bit(3)", json!("101"), json!("101")),
        ("$1::timestamptz", json!("2024-02-29T10:00:00Z"), json!("2024-02-29T10:00:00Z")),
        ("$1::interval", json!("P1Y2M3DT4H"), json!("P1Y2M3DT4H")),
        (
            "$1::uuid",
            json!("3f2504e0-4f89-11d3-9a0c-0305e82c3301"),
            json!("3f2504e0-4f89-11d3-9a0c-0305e82c3301"),
        ),
        ("$1::jsonb", json!({"a": [1, null, "x"]}), json!({"a": [1, null, "x"]})),
        ("$1::jsonb", json!("{\"a\": 1}"), json!({"a": 1})),
        ("$1::int4[]", json!([1, null, 3]), json!([1, null, 3])),
        (
            "$1::text[]",
            json!([["a,b", "c\"d"], ["\\", "NULL"]]),
            json!([["a,b", "c\"d"], ["\\", "NULL"]]),
        ),
        ("5 = any($1)", json!([4, 5]), json!(true)),
        ("$1::inet", json!("10.0.0.1"), json!("10.0.0.1")),
        ("$1::int4range", json!("[1,5)"), json!("[1,5)")),
        ("($1::int4[])[1:2]", json!([1, 2, 3]), json!([1, 2])),
        ("$1", json!("untyped"), json!("untyped")),
    ];
    for (expression, value, expected) in cases {
        let params = Params::List(vec![value]);
        let answer = run(&pool, &format!("select {expression} as v"), params).await;
        let answer = answer.unwrap_or_else(|failure| panic!("{expression}: {failure}"));
        assert_eq!(rows(answer), [json!([expected])], "{expression}");
    }
}

#[tokio::test]
async fn names_bind_where_they_are_names() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    run(
        &pool,
        "create table people (id int8 primary key, name varchar(20), tags text[])",
        Params::None,
    )
    .await
    .unwrap();
    let sql = "insert into people values (:id, :name, :tags)";
    let answer = run(&pool, sql, named(json!({"id": 7, "name": ":x", "tags": ["a"]}))).await;
    assert!(matches!(answer, Ok(Answer::Done { affected_rows: 1, .. })), "{answer:?}");
    let sql = "select ':id' as quoted, id::text, tags[1:1] /* :no */ from people \
               where id = :id and name = :name limit :limit -- :no";
    let params = named(json!({"id": 7, "name": ":x", "limit": 1}));
    assert_eq!(rows(run(&pool, sql, params).await.unwrap()), [json!([":id", "7", ["a"]])]);
}

#[tokio::test]
async fn a_parameter_cannot_become_sql() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    let evil = "x'); drop table people; --";
    for (sql, params) in [
        ("select $1::text", Params::List(vec![json!(evil)])),
        ("select :v::text", named(json!({"v": evil}))),
        ("select ($1::text[])[1]", Params::List(vec![json!([evil])])),
    ] {
        assert_eq!(rows(run(&pool, sql, params).await.unwrap()), [json!([evil])]);
    }
}

#[tokio::test]
async fn column_names_are_those_of_the_statement() {
    let cluster = Cluster::get();
    let params = Params::List(vec![json!(1), json!(2)]);
    let answer = run(&cluster.pool(), "select $1::int4, $2::int4 as b, 3 as b", params).await;
    let Ok(Answer::Rows(set)) = answer else { panic!("{answer:?}") };
    let names: Vec<_> = set.columns.iter().map(|column| column.name.as_str()).collect();
    assert_eq!(names, ["int4", "b", "b"]);
}

#[tokio::test]
async fn errors_do_not_repeat_values() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    for (sql, value) in [
        ("select $1::int4", json!("hunter2")),
        ("select $1::jsonb", json!("hunter2")),
        ("select $1::date", json!("hunter2")),
        ("select $1::int4", json!([1])),
        ("select $1::text", json!({"hunter2": 1})),
    ] {
        let failure = run(&pool, sql, Params::List(vec![value])).await.unwrap_err();
        let text = failure.to_json().to_string();
        assert!(!text.contains("hunter2"), "{text}");
    }
    let failure = run(&pool, "select json_build_object('a', $1)", Params::List(vec![json!(1)]))
        .await
        .unwrap_err();
    assert!(failure.to_json()["error"]["hint"].as_str().unwrap().contains("CAST"), "{failure}");
}
