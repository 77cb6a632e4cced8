//! Every type, as the server sends it.

use credbroker_sql_worker::sql::{Answer, Params};
use serde_json::{Value, json};

use crate::cluster::{Cluster, prepare, run, succeed};

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

    // Empty statements are none.
    let sql = ";; select '(1,2)'::point, ';' /* ; */ ; -- ;\n ;";
    let answer = crate::cluster::rows(run(&pool, sql, Params::None).await.unwrap());
    assert_eq!(answer, [json!(["(1,2)", ";"])]);

    // A statement that writes is wrapped too.
    run(&pool, "create table points (p point)", Params::None).await.unwrap();
    let sql = "insert into points values ('(1,2)'), (null) returning p";
    let answer = run(&pool, sql, Params::None).await.unwrap();
    assert!(matches!(&answer, Answer::Rows(set) if set.affected_rows == Some(2)), "{answer:?}");
    assert_eq!(crate::cluster::rows(answer), [json!(["(1,2)"]), json!([null])]);
    let sql = "explain (format json) insert into points values ('(1,2)') returning p";
    run(&pool, sql, Params::None).await.unwrap();
    let count = run(&pool, "select count(*)::int4 from points", Params::None).await.unwrap();
    assert_eq!(crate::cluster::rows(count), [json!([2])]);
}

/// Only at the top of a statement may one that writes stand in WITH.
#[tokio::test]
async fn a_list_of_changes_comes_as_text_and_runs_once() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    prepare(&pool, &[
        "create sequence steps",
        "create table q (n int4 default nextval('steps'), p point, h int4multirange)",
        "create table \"old q\" (like q)",
        "insert into q (p, h) values ('(1,2)', '{[1,3),[5,8)}'), ('(3,4)', '{}'), ('(5,6)', null)",
    ]).await;
    let gone = "with gone as (delete from q where n = :n returning *) -- gone\n\
                select h, p, nextval('steps') from gone -- end";
    let moved = "with recursive gone as (delete from q where n <> :n returning *), \
                 late(p, h) as not materialized (select p, h from gone) \
                 insert into \"old q\" (p, h) select p, h from late order by h desc \
                 returning (p), h, n;";
    let first = json!(["{[1,3),[5,8)}", "(1,2)", "4"]);
    let others = [json!(["(5,6)", null, null]), json!(["(3,4)", "{}", null])];
    for (sql, rows) in [(gone, &[first][..]), (moved, &others)] {
        let params = Params::Named([("n".to_owned(), json!(1))].into());
        let answer = run(&pool, sql, params).await.unwrap_or_else(|failure| panic!("{failure}"));
        let Answer::Rows(set) = &answer else { panic!("no rows: {sql}") };
        assert_eq!(set.affected_rows, Some(u64::try_from(rows.len()).unwrap()), "{sql}");
        assert_eq!(crate::cluster::rows(answer), rows, "{sql}");
    }
    let sql = "select (select count(*)::int4 from q), (select count(*)::int4 from \"old q\"), \
               (select last_value from steps)";
    let left = run(&pool, sql, Params::None).await.unwrap();
    assert_eq!(crate::cluster::rows(left), [json!([0, 2, "4"])]);
    // And none of it where nothing may be written.
    let sql = "with gone as (delete from \"old q\" returning *) select p from gone";
    let failure = run(&cluster.read_only(), sql, Params::None).await.unwrap_err();
    assert_eq!(failure.code().as_str(), "READ_ONLY");
}

#[tokio::test]
async fn enums_and_domains() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    prepare(
        &pool,
        &[
            "create type mood as enum ('happy', 'so so')",
            "create domain positive as int4 check (value > 0)",
        ],
    )
    .await;
    assert_eq!(one(&cluster, "'so so'::mood").await, ("mood".into(), json!("so so")));
    assert_eq!(one(&cluster, "array['happy']::mood[]").await, ("mood[]".into(), json!(["happy"])));
    assert_eq!(one(&cluster, "array[5]::positive[]").await.1, json!([5]));
    assert_eq!(one(&cluster, "5::positive").await.1, json!(5));
    let params = Params::List(vec![json!("happy"), json!(["so so"])]);
    let answer = run(&pool, "select $1::mood, $2::mood[]", params).await.unwrap();
    assert_eq!(crate::cluster::rows(answer), [json!(["happy", ["so so"]])]);
}

/// A type, and values of it as PostgreSQL reads them.
const TYPES: &[(&str, &[&str])] = &[
    ("bool", &["true", "false"]),
    ("\"char\"", &["x"]),
    ("int2", &["-32768", "32767"]),
    ("int4", &["-2147483648", "0"]),
    ("int8", &["-9223372036854775808", "9007199254740993"]),
    ("float4", &["3.4028235e38", "1.1754944e-38", "0.1", "NaN", "-Infinity", "-0"]),
    ("float8", &["1.7976931348623157e308", "5e-324", "0.1", "NaN", "Infinity", "-0"]),
    ("numeric", &["NaN", "Infinity", "-Infinity", "0.00", "12345678901234567890.123456789000"]),
    ("numeric(6, 2)", &["1234.50"]),
    ("money", &["$1,234.50", "-$0.01"]),
    ("text", &["", "é'\"\\ \n\t", "NULL"]),
    ("varchar(9)", &["ab "]),
    ("bpchar", &["ab  "]),
    ("char(4)", &["ab"]),
    ("name", &["a name"]),
    ("bytea", &["\\x", "\\x00ff5c27"]),
    (
        "date",
        &["2024-02-29", "infinity", "-infinity", "0044-03-15 BC", "4713-01-01 BC", "5874897-12-31"],
    ),
    ("time", &["00:00:00", "23:59:59.999999", "24:00:00"]),
    ("timetz", &["12:34:56+05:30", "00:00:00-15:59:59"]),
    (
        "timestamp",
        &[
            "2024-02-29 12:34:56.000001",
            "infinity",
            "0001-01-01 00:00:00 BC",
            "294276-12-31 23:59:59",
        ],
    ),
    (
        "timestamptz",
        &[
            "2024-02-29 12:00:00+02",
            "-infinity",
            "4713-01-01 00:00:00+00 BC",
            "10000-01-01 00:00:00+00",
        ],
    ),
    ("interval", &["1 year 2 mons -3 days 04:05:06.5", "-00:00:00.000001", "178000000 years", "0"]),
    ("uuid", &["3f2504e0-4f89-11d3-9a0c-0305e82c3301"]),
    ("inet", &["10.0.0.1/8", "::1", "10.0.0.1"]),
    ("cidr", &["10.0.0.0/8", "2001:db8::/32"]),
    ("macaddr", &["08:00:2b:01:02:03"]),
    ("macaddr8", &["08:00:2b:01:02:03:04:05"]),
    ("bit(10)", &["1010000011"]),
    ("varbit", &["", "101"]),
    ("json", &["{\"a\": [1, 2.5, null]}", "12345678901234567890", "\"x\"", "null", "true"]),
    (
        "jsonb",
        &[
            "{\"a\": {\"b\": [1e3, \"12\"]}}",
            "{\"n\": 12345678901234567890.10}",
            "\"x\"",
            "null",
            "[]",
        ],
    ),
    ("jsonpath", &["$.\"a\"[*]?(@ > 1)"]),
    ("xml", &["<a b=\"c\">&amp;</a>"]),
    ("tsvector", &["'a':1A 'b':2,3"]),
    ("tsquery", &["'a' & !'b' <-> 'c':*"]),
    ("point", &["(1.5,-2)"]),
    ("line", &["{1,-1,0}"]),
    ("lseg", &["[(0,0),(1,1)]"]),
    ("box", &["(1,1),(0,0)"]),
    ("path", &["((0,0),(1,1))", "[(0,0),(1,1)]"]),
    ("polygon", &["((0,0),(1,1),(1,0))"]),
    ("circle", &["<(1,2),3.5>"]),
    ("int4range", &["[1,5)", "empty", "(,)"]),
    ("int8range", &["[1,9007199254740993)"]),
    ("numrange", &["(1.10,2.20]"]),
    ("daterange", &["[2024-01-01,infinity)"]),
    ("tsrange", &["[\"2024-01-01 00:00:00\",)"]),
    ("tstzrange", &["[\"2024-01-01 00:00:00+00\",\"2024-01-02 00:00:00+00\")"]),
    ("int4multirange", &["{}", "{[1,3),[5,8)}", "{(,)}", "{(,0),[9,)}"]),
    ("int8multirange", &["{[1,9007199254740993)}"]),
    ("nummultirange", &["{(1.10,2.20],[3,)}"]),
    ("datemultirange", &["{[2024-01-01,2024-02-01),[2024-03-01,infinity)}"]),
    ("tsmultirange", &["{[\"2024-01-01 00:00:00\",)}"]),
    ("tstzmultirange", &["{}", "{[\"2024-01-01 00:00:00+00\",\"2024-01-02 00:00:00+00\")}"]),
    ("oid", &["4294967295"]),
    ("regclass", &["pg_class"]),
    ("regtype", &["integer"]),
    ("regproc", &["now"]),
    ("regrole", &["postgres"]),
    ("xid", &["42"]),
    ("xid8", &["18446744073709551615"]),
    ("cid", &["7"]),
    ("tid", &["(0,1)"]),
    ("pg_lsn", &["16/B374D848"]),
    ("pg_snapshot", &["10:20:10,14,15"]),
    ("txid_snapshot", &["10:20:10,14,15"]),
    ("aclitem", &["postgres=r/postgres"]),
    ("oidvector", &["1 2 3"]),
    ("int2vector", &["1 2"]),
    ("refcursor", &["a cursor"]),
    ("int4[]", &["{}", "{1,NULL,3}", "{{1,2},{3,NULL}}", "[0:1]={1,2}", "[-1:0][5:5]={{1},{2}}"]),
    ("text[]", &["{\"\",NULL,\"NULL\",\"a,b\",\"c\\\"d\",\"e\\\\f\"}"]),
    ("bytea[]", &["{\"\\\\x00ff\",\"\\\\x\"}", "[0:0]={\"\\\\xde\"}"]),
    ("numeric[]", &["{1.10,NaN}"]),
    ("timestamptz[]", &["{\"0044-03-15 00:00:00+00 BC\",infinity}"]),
    ("jsonb[]", &["{\"{\\\"a\\\": 1}\",NULL,\"null\"}"]),
    ("point[]", &["{\"(1,2)\"}"]),
    ("int4range[]", &["{\"[1,2)\"}"]),
    ("int4multirange[]", &["{}", "{\"{}\",NULL,\"{[1,2),[3,4)}\"}", "[0:0]={\"{(,)}\"}"]),
    ("mood_", &["so so"]),
    ("mood_[]", &["{happy,\"so so\"}"]),
    ("positive_", &["5"]),
    ("bytes_", &["\\x00ff"]),
    ("days_", &["0044-03-15 BC"]),
    ("pair_", &["(1,\"a \"\"b\"\"\")", "(,)"]),
    ("nested_", &["(\"(1,x)\",\"{1,2}\")"]),
    ("pair_[]", &["{\"(1,a)\",\"(2,b)\"}"]),
    ("floats_", &["[1.5,2.5)"]),
    ("floatses_", &["{}", "{[1.5,2.5),[3,)}"]),
    ("floatses_[]", &["{\"{[1.5,2.5)}\",NULL}"]),
    ("holes_", &["{[1,3),[5,8)}"]),
    ("many_holes_", &["{\"{[1,3),[5,8)}\"}"]),
    ("holed_", &["(1,\"{[1,3),[5,8)}\")"]),
    ("citext", &["MiXed"]),
    ("hstore", &["\"a\"=>\"1\", \"b\"=>NULL"]),
    ("ltree", &["top.science"]),
    ("lquery", &["top.*{1,2}"]),
    ("cube", &["(1, 2),(3, 4)"]),
    ("seg", &["1 .. 2"]),
    ("isbn", &["0-14-118280-6"]),
    ("lo", &["42"]),
];

#[tokio::test]
async fn fifty_types_round_trip() {
    let cluster = Cluster::get();
    let root = cluster.superuser();
    prepare(
        &root,
        &[
            "create type mood_ as enum ('happy', 'so so')",
            "create domain positive_ as int4 check (value > 0)",
            "create domain bytes_ as bytea",
            "create domain days_ as date",
            "create type pair_ as (n int4, t text)",
            "create type nested_ as (p pair_, a int4[])",
            "create type floats_ as range (subtype = float8, multirange_type_name = floatses_)",
            "create domain holes_ as int4multirange check (not value @> 4)",
            "create domain many_holes_ as int4multirange[]",
            "create type holed_ as (n int4, h int4multirange)",
            "create extension citext",
            "create extension hstore",
            "create extension ltree",
            "create extension cube",
            "create extension seg",
            "create extension isn",
            "create extension lo",
        ],
    )
    .await;
    let pool = cluster.read_only();
    let mut values = 0;
    for (type_name, literals) in TYPES {
        // json has no equality, and its text keeps white space.
        let shown = if *type_name == "json" { "::jsonb::text" } else { "::text" };
        for literal in literals.iter().copied().map(Some).chain([None]) {
            values += 1;
            let quoted = literal
                .map_or("null".to_owned(), |literal| format!("'{}'", literal.replace('\'', "''")));
            let sql = format!("select {quoted}::{type_name}, 1");
            let answer = succeed(&pool, &sql, Params::None).await;
            let cell = crate::cluster::rows(answer)[0][0].clone();
            assert_eq!(cell.is_null(), literal.is_none(), "{sql}: {cell}");
            let sql = format!(
                "select ($1::{type_name}){shown} is not distinct from \
                 ({quoted}::{type_name}){shown}, ($1::{type_name}){shown}"
            );
            let answer = run(&pool, &sql, Params::List(vec![cell.clone()])).await;
            let answer = answer.unwrap_or_else(|failure| panic!("{sql} of {cell}: {failure}"));
            let row = crate::cluster::rows(answer)[0].clone();
            assert_eq!(row[0], json!(true), "{sql}: {cell} came back as {}", row[1]);
        }
    }
    println!("{} types, {values} values", TYPES.len());
    assert!(TYPES.len() >= 50);
}

/// What can stand in no other statement is not run where its result could not be shown.
#[tokio::test]
async fn a_call_whose_result_has_no_codec_is_not_made() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    prepare(
        &pool,
        &[
            "create sequence calls",
            "create procedure turn(inout p point, inout n int4) language plpgsql as \
         $$ begin n := nextval('calls'); end $$",
            "create procedure count_up(inout n int4) language plpgsql as \
         $$ begin n := nextval('calls'); end $$",
        ],
    )
    .await;
    let failure = run(&pool, "call turn('(1,2)', 0)", Params::None).await.unwrap_err();
    assert_eq!(failure.code().as_str(), "UNSUPPORTED");
    assert!(failure.hint().is_some_and(|hint| hint.contains("must be text")), "{failure:?}");
    let answer = run(&pool, "call count_up(0)", Params::None).await.unwrap();
    assert_eq!(crate::cluster::rows(answer), [json!([1])]);
}

/// Whatever the server knows before anybody adds to it: as a column, and as a parameter.
#[tokio::test]
async fn every_built_in_type_is_a_column_and_a_parameter() {
    let cluster = Cluster::get();
    let pool = cluster.read_only();
    // A pseudo-type is that of no value.
    let names = "select format_type(oid, -1) from pg_type where typtype <> 'p' \
                 and typnamespace = 'pg_catalog'::regnamespace order by oid";
    let names = crate::cluster::rows(run(&pool, names, Params::None).await.unwrap());
    let mut shown = Vec::new();
    for row in &names {
        let name = row[0].as_str().unwrap();
        let sql = format!("select null::{name}, $1::{name} is null, $1::{name}");
        let answer = succeed(&pool, &sql, Params::List(vec![json!(null)])).await;
        let Answer::Rows(set) = &answer else { panic!("no rows: {sql}") };
        shown.push(set.columns[0].type_name.clone());
        assert_eq!(crate::cluster::rows(answer), [json!([null, true, null])], "{sql}");
    }
    println!("{} types", names.len());
    assert!(names.len() > 400);
    // Beside those that the driver does not know, all the others are called the same.
    let columns = names.iter().map(|row| format!("null::{}", row[0].as_str().unwrap()));
    let sql = format!("select {}", columns.collect::<Vec<_>>().join(", "));
    let Answer::Rows(set) = run(&pool, &sql, Params::None).await.unwrap() else { panic!("none") };
    let together = set.columns.into_iter().map(|column| column.type_name);
    assert_eq!(together.collect::<Vec<_>>(), shown);
}

/// What the server has for itself, and what holds values of any type.
#[tokio::test]
async fn what_is_internal_comes_as_its_text() {
    let cluster = Cluster::get();
    let root = cluster.superuser();
    prepare(
        &root,
        &[
            "create table kept (a int4 default 40 + 2, b int4, h int4multirange)",
            "insert into kept select n % 10, n % 10, int4multirange(int4range(n, n + 1)) \
         from generate_series(1, 1000) n",
            "create statistics kept_s (ndistinct, dependencies, mcv) on a, b from kept",
            "analyze kept",
        ],
    )
    .await;
    let wanted = [
        ("adbin", "pg_node_tree", "pg_attrdef where adrelid = 'kept'::regclass"),
        ("n_distinct", "pg_ndistinct", "pg_stats_ext where statistics_name = 'kept_s'"),
        ("dependencies", "pg_dependencies", "pg_stats_ext where statistics_name = 'kept_s'"),
        ("stxdmcv", "pg_mcv_list", "pg_statistic_ext_data where stxdmcv is not null"),
        ("most_common_vals", "anyarray", "pg_stats where tablename = 'kept' and attname = 'a'"),
        ("k", "kept", "kept k where a = 1"),
        ("row(h, 'x')", "record", "kept where a = 1"),
    ];
    for (what, type_name, from) in wanted {
        let sql = format!("select {what}, ({what})::text from {from} order by 2 limit 1");
        let answer = succeed(&root, &sql, Params::None).await;
        let Answer::Rows(set) = &answer else { panic!("no rows: {sql}") };
        assert_eq!(set.columns[0].type_name, type_name, "{sql}");
        let rows = crate::cluster::rows(answer);
        assert!(rows.len() == 1 && rows[0][0].as_str().is_some_and(|text| !text.is_empty()));
        assert_eq!(rows[0][0], rows[0][1], "{sql}");
    }
}

/// The driver cannot describe them; what a statement does is done once all the same.
#[tokio::test]
async fn multiranges_are_written_and_read_once() {
    let cluster = Cluster::get();
    let pool = cluster.pool();
    prepare(
        &pool,
        &[
            "create sequence told",
            "create table holes (n int4, h int4multirange, at int8 default nextval('told'))",
        ],
    )
    .await;
    let holes = [json!("{[1,3),[5,8)}"), json!("{}"), json!(null)];
    for (n, hole) in holes.iter().enumerate() {
        let sql = "insert into holes (n, h) values ($1, $2) returning *, $2 is null, array[h]";
        let answer = run(&pool, sql, Params::List(vec![json!(n), hole.clone()])).await.unwrap();
        let Answer::Rows(set) = &answer else { panic!("no rows") };
        let names: Vec<_> = set.columns.iter().map(|column| column.name.as_str()).collect();
        assert_eq!(names, ["n", "h", "at", "?column?", "array"]);
        let types: Vec<_> = set.columns.iter().map(|column| column.type_name.as_str()).collect();
        assert_eq!(types, ["int4", "int4multirange", "int8", "bool", "int4multirange[]"]);
        assert_eq!(set.affected_rows, Some(1));
        let array = match hole.as_str() {
            Some(text) => format!("{{\"{text}\"}}"),
            None => "{NULL}".to_owned(),
        };
        let row = json!([n, hole, (n + 1).to_string(), hole.is_null(), array]);
        assert_eq!(crate::cluster::rows(answer), [row]);
    }
    let sql =
        "select h, n from holes where h @> :n::int4 or h is not distinct from :h order by at desc";
    let params = [("n".to_owned(), json!(2)), ("h".to_owned(), json!("{}"))];
    let answer = run(&pool, sql, Params::Named(params.into())).await.unwrap();
    assert_eq!(crate::cluster::rows(answer), [json!(["{}", 1]), json!(["{[1,3),[5,8)}", 0])]);
    // A parameter alone, with a result and without one.
    let list = || Params::List(vec![json!("{[4,5)}")]);
    let answer = run(&pool, "update holes set h = h + $1", list()).await.unwrap();
    assert!(matches!(answer, Answer::Done { affected_rows: 3, .. }), "{answer:?}");
    let answer = run(&pool, "select count(*)::int4 from holes where h = $1", list()).await.unwrap();
    assert_eq!(crate::cluster::rows(answer), [json!([1])]);
    // What the server says of a bad one is said.
    let bad = Params::List(vec![json!("{[")]);
    let failure = run(&pool, "select $1::int4multirange", bad).await.unwrap_err();
    assert_eq!((failure.code().as_str(), failure.sqlstate()), ("SQL_ERROR", Some("22P02")));
    assert_eq!(one(&cluster, "1").await.1, json!(1));
}

/// What a cast to text writes is its maker's.
#[tokio::test]
async fn a_value_is_written_as_the_server_writes_it() {
    let cluster = Cluster::get();
    let owner = cluster.pool();
    prepare(
        &owner,
        &[
            "create type forged as (n int4, t text)",
            "create function forge(forged) returns text language sql return 'forged'",
            "create cast (forged as text) with function forge(forged) as assignment",
        ],
    )
    .await;
    let sql = "select row(1, 'a')::forged, row(null, null)::forged, null::forged, \
               array[row(1, 'a')::forged], row(1, 'a')::forged::text";
    let answer = run(&cluster.read_only(), sql, Params::None).await.unwrap();
    let row = json!(["(1,a)", "(,)", null, "{\"(1,a)\"}", "forged"]);
    assert_eq!(crate::cluster::rows(answer), [row]);
}

/// The driver's own look-up and ours call a type by one name, and show its values alike.
#[tokio::test]
async fn a_type_is_the_same_beside_one_that_the_driver_does_not_know() {
    let cluster = Cluster::get();
    let root = cluster.superuser();
    prepare(&root, &[
        "create schema beside authorization app",
        "create type beside.\"Mood?\" as enum ('ok')",
        "create domain beside.moods as beside.\"Mood?\"[]",
        "create domain beside.small as int4 check (value < 9)",
        "create domain beside.smaller as beside.small",
        "create type beside.pair as (n int4, m beside.moods)",
        "create type beside.spans as range (subtype = float8, multirange_type_name = beside.gaps)",
    ]).await;
    let pool = cluster.read_only();
    for value in [
        "array['ok'::beside.\"Mood?\", null]",
        "array['ok']::beside.moods",
        "row(1, array['ok'])::beside.pair",
        "7::beside.smaller",
        "array[7::beside.smaller]",
        "'{[1,2]}'::beside.gaps",
        "array['{[1,2]}'::beside.gaps]",
        "'[0:1]={1,2}'::int4[]",
        "'1 2'::int2vector",
        "array['1 2'::oidvector]",
        "'a'::\"char\"",
    ] {
        let mut seen = Vec::new();
        for beside in ["", ", null::int4multirange"] {
            let sql = format!("select {value}{beside}");
            let answer = succeed(&pool, &sql, Params::None).await;
            let Answer::Rows(set) = &answer else { panic!("no rows: {sql}") };
            let type_name = set.columns[0].type_name.clone();
            seen.push((type_name, crate::cluster::rows(answer)[0][0].clone()));
        }
        assert_eq!(seen[0], seen[1], "{value}");
    }
}
