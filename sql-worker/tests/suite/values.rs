//! Every type, as the server sends it.

use credbroker_sql_worker::sql::{Answer, Params};
use serde_json::{Value, json};

use crate::cluster::{Cluster, run};

/// Type and value of `select EXPRESSION`.
async fn one(cluster: &Cluster, expression: &str) -> (String, Value) {
    let answer = run(&cluster.pool(), &format!("select {expression}"), Params::None).await;
    let Answer::Rows(set) = answer.unwrap_or_else(|failure| panic!("{expression}: {failure}"))
    else {
        panic!("no rows");
    };
    let type_name = set.columns[0].type_name.clone();
    (type_name, crate::cluster::rows(Answer::Rows(set))[0][0].clone())
}

#[tokio::test]
async fn scalars_come_as_contracted() {
    let cluster = Cluster::get();
    let cases = [
        ("true", "bool", json!(true)),
        ("(-32768)::int2", "int2", json!(-32768)),
        ("2147483647", "int4", json!(2_147_483_647)),
        ("9007199254740993::int8", "int8", json!("9007199254740993")),
        ("4294967295::oid", "oid", json!(4_294_967_295_u32)),
        ("0.1::float4", "float4", json!(0.1)),
        ("'NaN'::float8", "float8", json!("NaN")),
        ("'-Infinity'::float4", "float4", json!("-Infinity")),
        ("1e308::float8", "float8", json!(1e308)),
        ("1.10::numeric", "numeric", json!("1.10")),
        ("'NaN'::numeric", "numeric", json!("NaN")),
        ("'Infinity'::numeric", "numeric", json!("Infinity")),
        ("'é''x'::text", "text", json!("é'x")),
        ("'ab'::char(4)", "bpchar", json!("ab  ")),
        ("'x'::\"char\"", "char", json!("x")),
        ("'n'::name", "name", json!("n")),
        (
            "'3f2504e0-4f89-11d3-9a0c-0305e82c3301'::uuid",
            "uuid",
            json!("3f2504e0-4f89-11d3-9a0c-0305e82c3301"),
        ),
        ("'\\xdeadbeef'::bytea", "bytea", json!("3q2+7w==")),
        ("'2024-02-29'::date", "date", json!("2024-02-29")),
        ("'infinity'::date", "date", json!("infinity")),
        ("'12:34:56.789'::time", "time", json!("12:34:56.789")),
        ("'12:34:56+05:30'::timetz", "timetz", json!("12:34:56+05:30")),
        (
            "'2024-02-29 12:34:56.000001'::timestamp",
            "timestamp",
            json!("2024-02-29T12:34:56.000001"),
        ),
        ("'2024-02-29 12:00:00+02'::timestamptz", "timestamptz", json!("2024-02-29T10:00:00Z")),
        ("'10000-01-01 00:00:00+00'::timestamptz", "timestamptz", json!("+10000-01-01T00:00:00Z")),
        ("'0044-03-15 BC'::date", "date", json!("-0043-03-15")),
        ("'1 year 2 mons -3 days 04:05:06.5'::interval", "interval", json!("P1Y2M-3DT4H5M6.5S")),
        (
            "'{\"a\": [1, 12345678901234567890, null]}'::jsonb",
            "jsonb",
            json!("{\"a\": [1, 12345678901234567890, null]}"),
        ),
        ("'{\"a\": [1, 1.50, null]}'::jsonb", "jsonb", json!({"a": [1, 1.5, null]})),
        ("'\"a\"'::jsonb", "jsonb", json!("\"a\"")),
        ("'null'::jsonb", "jsonb", json!("null")),
        ("'[0:1]={1,2}'::int4[]", "int4[]", json!("[0:1]={1,2}")),
        ("'{\"a\" : 1}'::json", "json", json!({"a": 1})),
        ("'10.0.0.1/8'::inet", "inet", json!("10.0.0.1/8")),
        ("'2001:db8::/32'::cidr", "cidr", json!("2001:db8::/32")),
        ("'08:00:2b:01:02:03'::macaddr", "macaddr", json!("08:00:2b:01:02:03")),
        ("B'101'", "bit", json!("101")),
        ("B'1010000011'::varbit", "varbit", json!("1010000011")),
        ("'<a/>'::xml", "xml", json!("<a/>")),
        ("null::int4", "int4", json!(null)),
        ("pg_sleep(0)", "void", json!("")),
        ("array[[1, null], [3, 4]]", "int4[]", json!([[1, null], [3, 4]])),
        ("array[1.5, 'NaN']::numeric[]", "numeric[]", json!(["1.5", "NaN"])),
        ("'{}'::text[]", "text[]", json!([])),
        ("array['a', null, 'b,c']", "text[]", json!(["a", null, "b,c"])),
        ("array['{\"a\":1}'::jsonb]", "jsonb[]", json!([{"a": 1}])),
    ];
    for (expression, type_name, value) in cases {
        assert_eq!(one(&cluster, expression).await, (type_name.to_owned(), value), "{expression}");
    }
}

#[tokio::test]
async fn numerics_are_what_the_server_prints() {
    let cluster = Cluster::get();
    let sql = "select n, n::text from (values (0.00), (1e-20), (123456789012345678901234567890.5), \
               (-0.1), (10000), (1e40), (100000.00001), (0.00010000), (9999.9999)) v(n)";
    for row in crate::cluster::rows(run(&cluster.pool(), sql, Params::None).await.unwrap()) {
        assert_eq!(row[0], row[1]);
    }
}

#[tokio::test]
async fn what_has_no_codec_comes_as_text_and_runs_once() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    let cases = [
        ("'[1,5)'::int4range", "int4range", json!("[1,5)")),
        ("'(1,2)'::point", "point", json!("(1,2)")),
        ("row(1, 'a b')", "record", json!("(1,\"a b\")")),
        ("'pg_class'::regclass", "regclass", json!("pg_class")),
        ("'1.50'::money", "money", json!("$1.50")),
        ("'a & b'::tsquery", "tsquery", json!("'a' & 'b'")),
        ("array['(1,2)'::point]", "point[]", json!("{\"(1,2)\"}")),
    ];
    for (expression, type_name, value) in cases {
        assert_eq!(one(&cluster, expression).await, (type_name.to_owned(), value), "{expression}");
    }

    run(&pool, "create sequence once", Params::None).await.unwrap();
    let sql = "select '(1,2)'::point as p, nextval('once') as n from generate_series(1, 3) -- end";
    let answer = crate::cluster::rows(run(&pool, sql, Params::None).await.unwrap());
    assert_eq!(answer, [json!(["(1,2)", "1"]), json!(["(1,2)", "2"]), json!(["(1,2)", "3"])]);

    // A statement that writes is wrapped too, unless it is WITH, and has then not run at all.
    run(&pool, "create table points (p point)", Params::None).await.unwrap();
    let sql = "insert into points values ('(1,2)'), (null) returning p";
    let answer = run(&pool, sql, Params::None).await.unwrap();
    assert!(matches!(&answer, Answer::Rows(set) if set.affected_rows == Some(2)), "{answer:?}");
    assert_eq!(crate::cluster::rows(answer), [json!(["(1,2)"]), json!([null])]);
    let sql = "with old as (delete from points returning p) select p from old";
    let failure = run(&pool, sql, Params::None).await.unwrap_err();
    assert_eq!(failure.code().as_str(), "UNSUPPORTED");
    let count = run(&pool, "select count(*)::int4 from points", Params::None).await.unwrap();
    assert_eq!(crate::cluster::rows(count), [json!([2])]);
}

#[tokio::test]
async fn enums_and_domains() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    for sql in [
        "create type mood as enum ('happy', 'so so')",
        "create domain positive as int4 check (value > 0)",
    ] {
        run(&pool, sql, Params::None).await.unwrap();
    }
    assert_eq!(one(&cluster, "'so so'::mood").await, ("mood".into(), json!("so so")));
    assert_eq!(one(&cluster, "array['happy']::mood[]").await, ("mood[]".into(), json!(["happy"])));
    assert_eq!(one(&cluster, "array[5]::positive[]").await.1, json!([5]));
    assert_eq!(one(&cluster, "5::positive").await.1, json!(5));
    let params = Params::List(vec![json!("happy"), json!(["so so"])]);
    let answer = run(&pool, "select $1::mood, $2::mood[]", params).await.unwrap();
    assert_eq!(crate::cluster::rows(answer), [json!(["happy", ["so so"]])]);
}
