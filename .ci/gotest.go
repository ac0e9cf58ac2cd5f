// Command gotest runs "go test -json" with the given arguments and prints the same as "go test": a line for each package,
// and the output of each test that failed. Unlike "go test" it counts a skipped test as a failure and names it, because a
// test that CI skips protects nothing. Its last line has the number of tests.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// An event is one line of "go test -json" (see "go doc test2json").
type event struct {
	Action  string
	Package string
	Test    string // empty for the package itself
	Output  string
}

func main() {
	cmd := exec.Command("go", append([]string{"test", "-json"}, os.Args[1:]...)...)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Println("gotest:", err)
		os.Exit(2)
	}

	var passed, failed, skipped int
	type test struct{ pkg, name string }
	outputs := map[test]*strings.Builder{} // of the tests that have not ended yet
	for lines := bufio.NewReader(stdout); ; {
		line, err := lines.ReadString('\n')
		if err != nil {
			break // the end; the exit status tells about errors
		}
		var e event
		if json.Unmarshal([]byte(line), &e) != nil {
			fmt.Print(line)
			continue
		}
		id := test{e.Package, e.Test}
		out := outputs[id]
		if out == nil {
			out = new(strings.Builder)
			outputs[id] = out
		}
		top := !strings.Contains(e.Test, "/")
		switch e.Action {
		case "build-output":
			fmt.Print(e.Output)
		case "output":
			out.WriteString(e.Output)
		case "pass", "skip", "fail":
			delete(outputs, id)
			switch {
			case e.Test == "" && e.Action == "fail":
				// After a panic or a timeout some tests have not ended.
				for other, rest := range outputs {
					if other.pkg == e.Package {
						fmt.Print(rest)
						delete(outputs, other)
					}
				}
				fmt.Print(out)
			case e.Test == "":
				// The last line is the result: ok, or no test files.
				result := strings.TrimSuffix(out.String(), "\n")
				fmt.Println(result[strings.LastIndex(result, "\n")+1:])
			case e.Action == "skip":
				fmt.Printf("%sa skipped test is a failure here: %s in %s\n", out, e.Test, e.Package)
				skipped++
			case e.Action == "fail":
				fmt.Print(out)
				if top {
					failed++
				}
			case top:
				passed++
			}
		}
	}
	err = cmd.Wait()
	fmt.Printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped)
	if err != nil || passed == 0 || failed > 0 || skipped > 0 {
		os.Exit(1)
	}
}
