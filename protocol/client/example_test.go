package client_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"time"

	"millrace/protocol/client"
)

// Two people talk. The state files make it safe to kill either process at any moment.
func Example() {
	url, stop := client.StartServer()
	defer stop()
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	alice, err := client.Dial(ctx, client.Options{
		URL:       url,
		Token:     client.StaticToken("alice"), // see protocol/token for real ones
		StatePath: filepath.Join(dir, "alice.state"),
	})
	if err != nil {
		log.Fatal(err)
	}
	defer alice.Close()
	bob, err := client.Dial(ctx, client.Options{
		URL:       url,
		Token:     client.StaticToken("bob"),
		StatePath: filepath.Join(dir, "bob.state"),
	})
	if err != nil {
		log.Fatal(err)
	}
	defer bob.Close()

	if _, err := alice.Send(ctx, "bob", "hello"); err != nil { // returns when the server has it on disk
		log.Fatal(err)
	}
	m, err := bob.Receive(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s: %s\n", m.Sender, m.Text)
	if err := bob.Acknowledge(ctx, m); err != nil { // it has been shown: never again
		log.Fatal(err)
	}
	// Output: alice: hello
}

// Queue does not wait for the server; events tell what becomes of a send.
func ExampleClient_Queue() {
	url, stop := client.StartServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	c, err := client.Dial(ctx, client.Options{
		URL:        url,
		Token:      client.StaticToken("alice"),
		Background: true, // there need not be a network yet
		OnEvent: func(e client.Event) {
			switch e := e.(type) {
			case client.Answered:
				fmt.Println("✓", e.Text)
			case client.Delivered:
				fmt.Println("✓✓ everything up to", e.Number, "has reached", e.Receiver)
			case client.Disconnected:
				fmt.Println("disconnected:", e.Err, "trying again in", e.RetryIn)
			}
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	for _, text := range []string{"one", "two"} {
		if _, err := c.Queue(ctx, "bob", text); err != nil {
			log.Fatal(err)
		}
	}
	if err := c.Drain(ctx); err != nil {
		log.Fatal(err)
	}
	if err := c.Close(); err != nil { // waits until OnEvent has seen everything
		log.Fatal(err)
	}
	// Output:
	// ✓ one
	// ✓ two
}

// A final refusal is a *RefusedError: the message will not be delivered.
func ExampleRefusedError() {
	url, stop := client.StartServer()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	c, err := client.Dial(ctx, client.Options{URL: url, Token: client.StaticToken("alice")})
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	_, err = c.Send(ctx, "nobody here", "hello")
	var refused *client.RefusedError
	if errors.As(err, &refused) {
		fmt.Println(refused.Code)
	}
	// Output: bad_receiver
}
