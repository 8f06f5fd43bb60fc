package protocol

import (
	"encoding/hex"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

var aboutJSON = []string{
	"Golden vectors of the subprotocol millrace.v1.json; doc.go specifies it. Each is one WebSocket message.",
	"text is the message, or hex where it is not UTF-8; from says who sends it; results are the objects that a reader gets out of it and the errors it meets, in order.",
	"A message has kind and every field of that kind, zero when absent; message_ids and receipts are lists, of one entry here. code_number is the code of the binary encoding, 65535 for an unknown name.",
	"An error has the code of the error that a server answers and, where the reader knows it, message_id_by_client.",
	"encode: writing the one message of results gives exactly text. Other ways to write the same JSON are as good; these are what the server writes.",
	"Bytes that are not UTF-8 are bad_request here; in a connection the WebSocket layer closes with 1007 before it comes to that.",
	"What a server refuses later, by rules about a user's input, is not here but in values.json, sends.",
}

// jsonVectors is the table of testdata/json.json.
func jsonVectors() (list []vector) {
	add := func(name, from, text string, encode bool, results ...message) {
		v := vector{Name: name, From: from, Text: text, Encode: encode, Results: describeAll(results)}
		if !utf8.ValidString(text) {
			v.Text, v.Hex = "", hex.EncodeToString([]byte(text))
		}
		list = append(list, v)
	}
	for _, v := range validFrames() {
		if !hasList(&v.Frame) {
			add(v.name, from(v.Kind), string(AppendJSON(nil, &v.Frame)), true, good(v.Frame))
		}
	}

	send := func(content string) Frame {
		return Frame{Kind: KindSend, Seq: 1, Timestamp: testMillis, Receiver: []byte("bob"), Content: []byte(content)}
	}
	hi := send("hi")
	const hiText = `{"action":"send_message","receiver_id":"bob","content":"hi","message_id_by_client":1,"timestamp":1692841226851}`
	const ackText = `{"type":"message_delivered","message_id":"01J4N3PK2XDSZR14D2PF2DBSQQ","timestamp":5}`
	ackID, _ := ParseMessageID([]byte("01J4N3PK2XDSZR14D2PF2DBSQQ"))
	ack := Frame{Kind: KindAcknowledge, Timestamp: 5, IDs: []MessageID{ackID}}
	sendText := func(rest string) string { return `{"action":"send_message","message_id_by_client":1,` + rest + `}` }

	// Ways to write the same thing.
	add("type in place of action", "client", strings.Replace(hiText, "action", "type", 1), false, good(hi))
	add("action and type that agree", "client", strings.Replace(hiText, `{`, `{"type":"send_message",`, 1), false, good(hi))
	add("action in place of type", "client", strings.Replace(ackText, "type", "action", 1), false, good(ack))
	add("keys in another order, white space", "client", " \t{ \"timestamp\" :1692841226851 ,\r\n\"message_id_by_client\": 1,\"content\":\"hi\",\n\"receiver_id\":\"bob\",\"action\":\"send_message\"\t} ", false, good(hi))
	add("unknown fields of every type", "client", strings.Replace(hiText, `{`, `{"x":null,"y":[1,-2.5e+3,{"action":"connect"},[],{}],"z":{"a":{"b":[true,false,null]}},"Action":"connect","s":"\ud800 \" \\","n":-0.0E-0,`, 1), false, good(hi))
	add("fields of other messages, of any type", "client", strings.Replace(hiText, `{`, `{"token":5,"message_id":[1],"position":"x","code":null,`, 1), false, good(hi))
	add("null is absent", "client", `{"action":"connect","type":null,"token":"t","device":null,"epoch":null,"receipts_after":null}`, false, good(Frame{Kind: KindConnect, Token: []byte("t")}))
	add("empty device is the default", "client", `{"action":"connect","token":"t","device":""}`, false, good(Frame{Kind: KindConnect, Token: []byte("t")}))
	add("epoch in upper case", "client", `{"action":"connect","token":"t","epoch":"00AB00CD00EF0012"}`, false, good(Frame{Kind: KindConnect, Token: []byte("t"), Epoch: 0x00AB00CD00EF0012}))
	add("message id in lower case", "client", strings.ToLower(ackText), false, good(ack))
	add("escaped keys and names", "client", `{"\u0061ction":"send\u005fmessage","receiver_id":"b\u006fb","content":"\u0068i","message_id_by_client":1,"timestamp":1692841226851}`, false, good(hi))
	add("every escape", "client", sendText(`"receiver_id":"bob","timestamp":1692841226851,"content":"\"\\\/\b\f\n\r\t\u0041\u00e9\u20ac\uD83D\ude00\u0000\u202e"`), false, good(send("\"\\/\b\f\n\r\tAé€😀\x00\u202e")))
	add("U+FFFD, U+FFFE and U+2028 as they are", "client", sendText("\"receiver_id\":\"bob\",\"timestamp\":1692841226851,\"content\":\"\ufffd\ufffe\u2028\""), false, good(send("\ufffd\ufffe\u2028")))
	add("U+FFFD escaped", "client", sendText(`"receiver_id":"bob","timestamp":1692841226851,"content":"\ufffd"`), false, good(send("\ufffd")))
	add("no timestamp", "client", `{"action":"send_message","receiver_id":"bob","content":"hi","message_id_by_client":2}`, false, good(Frame{Kind: KindSend, Seq: 2, Receiver: []byte("bob"), Content: []byte("hi")}))
	add("no receiver and no content are refused later", "client", `{"action":"send_message","message_id_by_client":2}`, false, good(Frame{Kind: KindSend, Seq: 2}))
	add("number 0 is refused later", "client", `{"action":"send_message","message_id_by_client":0}`, false, good(Frame{Kind: KindSend}))
	add("nesting of 32", "client", strings.Replace(hiText, `{`, `{"x":`+strings.Repeat("[", 31)+strings.Repeat("]", 31)+`,`, 1), false, good(hi))

	// Several objects.
	add("two objects", "client", hiText+"\n"+ackText, false, good(hi), good(ack))
	add("blank lines and a newline at the end", "client", "\r\n\n  \t\n"+hiText+" \r\n\r\n"+ackText+"\n\n", false, good(hi), good(ack))
	add("white space alone", "client", " \r\n\t\n", false)
	add("a broken object between two", "client", hiText+"\n{\"action\":\"send_message\",\"message_id_by_client\":7,\n"+ackText, false, good(hi), badSend(CodeBadRequest, 7))
	add("a broken line between two", "client", hiText+"\nnonsense {\n"+ackText, false, good(hi), bad(CodeBadRequest), good(ack))
	add("a bad field between two", "client", hiText+"\n{\"action\":\"send_message\",\"message_id_by_client\":7,\n\"content\":5}\n"+ackText, false, good(hi), badSend(CodeBadRequest, 7), good(ack))
	add("an unknown action between two", "client", hiText+"\n{\"action\":\"dance\"}\n"+ackText, false, good(hi), bad(CodeUnknownAction), good(ack))
	add("two objects on one line", "client", hiText+ackText+"\n"+ackText, false, badSend(CodeBadRequest, 1), good(ack))
	add("a comma between two", "client", hiText+",\n"+ackText, false, badSend(CodeBadRequest, 1), good(ack))

	// Not JSON, or not an object.
	for i, text := range []string{
		`{`, `}`, `[]`, `"send_message"`, `5`, `null`, `x`, `{"action"}`, `{"action":}`, `{"action":"renew"`, `{"action":"renew",}`, `{,}`,
		`{"action":"renew" "token":"t"}`, `{'action':'renew'}`, `{action:"renew"}`, `{"action":"renew","x":01}`, `{"action":"renew","x":1.}`,
		`{"action":"renew","x":.5}`, `{"action":"renew","x":+1}`, `{"action":"renew","x":1e}`, `{"action":"renew","x":-}`, `{"action":"renew","x":nul}`,
		`{"action":"renew","x":True}`, `{"action":"renew","x":[1,]}`, `{"action":"renew","x":[1}`, `{"action":"renew","x":{"a"}}`, `{"action":"renew","x":NaN}`,
		`{"action":"renew","token":"\x41"}`, `{"action":"renew","token":"\u00g0"}`, `{"action":"renew","token":"\u00"}`, `{"action":"renew","token":"t\`,
		"{\"action\":\"renew\",\"token\":\"a\tb\"}", "\ufeff{\"action\":\"renew\"}", "{\"action\":\"renew\"\x00}", "\x00", "{\"action\":\"renew\",\u00a0\"x\":1}",
	} {
		add("not an object "+strconv.Itoa(i+1), "client", text, false, bad(CodeBadRequest))
	}
	add("nesting of 33", "client", `{"x":`+strings.Repeat("[", 32)+strings.Repeat("]", 32)+`,"action":"renew"}`, false, bad(CodeBadRequest))

	// JSON, but not a message.
	add("no action", "client", `{"token":"t"}`, false, bad(CodeBadRequest))
	add("action is not a string", "client", `{"action":5}`, false, bad(CodeBadRequest))
	add("action and type that do not agree", "client", `{"action":"renew","type":"connect","token":"t"}`, false, bad(CodeBadRequest))
	add("action twice", "client", `{"action":"renew","action":"renew","token":"t"}`, false, bad(CodeBadRequest))
	add("unknown action", "client", `{"action":"dance"}`, false, bad(CodeUnknownAction))
	add("empty action", "client", `{"action":""}`, false, bad(CodeUnknownAction))
	add("names are case sensitive", "client", `{"action":"Connect","token":"t"}`, false, bad(CodeUnknownAction))
	add("a server's message from a client", "client", `{"type":"incoming_message"}`, false, bad(CodeUnknownAction))
	add("a field twice", "client", `{"action":"renew","token":"t","token":"t"}`, false, bad(CodeBadRequest))
	add("a field twice, once under an escaped key", "client", `{"action":"renew","token":"t","tok\u0065n":"t"}`, false, bad(CodeBadRequest))

	// Sends.
	add("send without a number", "client", `{"action":"send_message","receiver_id":"bob","content":"hi"}`, false, bad(CodeBadRequest))
	for _, number := range []string{`"1"`, `1.0`, `1e0`, `-1`, `-0`, `281474976710656`, `18446744073709551617`, `99999999999999999999999999`, `true`, `[1]`, `null`} {
		add("send, number "+number, "client", `{"action":"send_message","receiver_id":"bob","content":"hi","message_id_by_client":`+number+`}`, false, bad(CodeBadRequest))
	}
	for _, c := range []struct{ name, field string }{
		{"content is a number", `"content":5`},
		{"content with a lone high surrogate", `"content":"a\ud800b"`},
		{"content with a high surrogate at the end", `"content":"a\ud83d"`},
		{"content with a lone low surrogate", `"content":"\ude00"`},
		{"content with surrogates in the wrong order", `"content":"\ude00\ud83d"`},
		{"content with a high surrogate and a letter", `"content":"\ud83d\u0041"`},
		{"content is not UTF-8", "\"content\":\"a\x80b\""},
		{"content with an overlong form", "\"content\":\"\xc0\x80\""},
		{"content with a surrogate in UTF-8", "\"content\":\"\xed\xa0\x80\""},
		{"receiver is a list", `"receiver_id":["bob"]`},
		{"timestamp is a string", `"timestamp":"5"`},
		{"timestamp with a fraction", `"timestamp":5.5`},
		{"timestamp over 42 bits", `"timestamp":4398046511104`},
	} {
		add("send, "+c.name, "client", sendText(c.field), false, badSend(CodeBadRequest, 1))
	}

	// Other messages of a client.
	for _, c := range []struct{ name, field string }{
		{"15 digits", `"epoch":"0f1e2d3c4b5a697"`}, {"17 digits", `"epoch":"0f1e2d3c4b5a69788"`}, {"not hex", `"epoch":"0f1e2d3c4b5a697g"`},
		{"a number", `"epoch":1`}, {"empty", `"epoch":""`},
	} {
		add("connect, epoch is "+c.name, "client", `{"action":"connect","token":"t",`+c.field+`}`, false, bad(CodeBadRequest))
	}
	add("connect, device of 33 characters", "client", `{"action":"connect","token":"t","device":"`+strings.Repeat("d", 33)+`"}`, false, bad(CodeBadRequest))
	add("connect, device with a space", "client", `{"action":"connect","token":"t","device":"my phone"}`, false, bad(CodeBadRequest))
	add("connect, token is a number", "client", `{"action":"connect","token":5}`, false, bad(CodeBadRequest))
	add("connect, receipts_after is negative", "client", `{"action":"connect","token":"t","receipts_after":-1}`, false, bad(CodeBadRequest))
	add("acknowledge without an id", "client", `{"type":"message_delivered","timestamp":5}`, false, bad(CodeBadRequest))
	for _, id := range []string{"", "01J4N3PK2XDSZR14D2PF2DBSQ", "01J4N3PK2XDSZR14D2PF2DBSQQQ", "81J4N3PK2XDSZR14D2PF2DBSQQ", "01J4N3PK2XDSZR14D2PF2DBSQU", "01J4N3PK2XDSZR14D2PF2DBSQO", "01J4N3PK-XDSZR14D2PF2DBSQQ"} {
		add("acknowledge, id "+id, "client", `{"type":"message_delivered","message_id":"`+id+`"}`, false, bad(CodeBadRequest))
	}

	// Messages of a server.
	renewed := Frame{Kind: KindRenewed}
	add("a type of a later version is skipped", "server", "{\"type\":\"typing\",\"x\":1}\n{\"type\":\"renewed\"}", false, good(renewed))
	add("a type of a later version alone", "server", `{"type":"typing"}`, false)
	add("error with a code of a later version", "server", `{"type":"error","code":"too_early","text":"later","retry_after_ms":250}`, false,
		good(Frame{Kind: KindError, Code: CodeUnknown, Text: []byte("later"), RetryAfterMs: 250}))
	add("incoming_message without a position", "server", `{"type":"incoming_message","message_id":"01J4N3PK2XDSZR14D2PF2DBSQQ","sender_id":"a","receiver_id":"b","content":"c"}`, false, bad(CodeBadRequest))
	add("incoming_message, position over 53 bits", "server", `{"type":"incoming_message","message_id":"01J4N3PK2XDSZR14D2PF2DBSQQ","position":9007199254740992,"sender_id":"a","receiver_id":"b","content":"c"}`, false, bad(CodeBadRequest))
	add("incoming_message, the timestamp is the position's", "server", `{"type":"incoming_message","message_id":"01J4N3PK2XDSZR14D2PF2DBSQQ","position":2048,"sender_id":"a","receiver_id":"b","content":"c","timestamp":77}`, false,
		good(Frame{Kind: KindIncoming, ID: ackID, Position: 2048, Timestamp: 1, Sender: []byte("a"), Receiver: []byte("b"), Content: []byte("c")}))
	add("connected without a number", "server", `{"type":"connected","user_id":"alice","device":"d","epoch":"0000000000000001"}`, false, bad(CodeBadRequest))
	add("error without a code", "server", `{"type":"error","text":"x"}`, false, bad(CodeBadRequest))
	return list
}

func TestJSONVectors(t *testing.T) {
	checkGolden(t, "json.json", vectorFile{aboutJSON, jsonVectors()})
	runVectors(t, "json.json", jsonParser, AppendJSON)
}
